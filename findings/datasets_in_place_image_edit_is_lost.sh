#!/usr/bin/env bash
# datasets 5.2.0
# Expected: an image that is resized in place (PIL's thumbnail) before it is stored has the new size in the data set.
# Seen: an image that Pillow opened from a file is stored as that file, so the edit is lost without a message: when
#       a data set is built, and in map, where the image was changed and returned.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import os

os.environ["HF_HOME"] = os.getcwd()
import datasets
from PIL import Image

datasets.disable_progress_bars()
Image.new("RGB", (100, 100), "gray").save("large.png")

image = Image.open("large.png")
image.thumbnail((32, 32))
features = datasets.Features({"image": datasets.Image()})
built = datasets.Dataset.from_dict({"image": [image]}, features=features)


def shrink(example):
    example["image"].thumbnail((32, 32))
    return example


mapped = datasets.Dataset.from_dict({"image": ["large.png"]}, features=features).map(shrink)
print(f"resized to {image.size}; stored {built[0]['image'].size}; after map {mapped[0]['image'].size}")
assert image.size == (32, 32)
assert built[0]["image"].size == mapped[0]["image"].size == (100, 100), "the behaviour changed"
PYTHON
