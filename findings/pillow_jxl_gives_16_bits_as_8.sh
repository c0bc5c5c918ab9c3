#!/usr/bin/env bash
# pillow-jxl-plugin 1.3.8, Pillow 13.0.0
# Expected: a JPEG XL image of 16 bits a value opens as 16 bits, or is refused, as Pillow does with 16-bit colour PNG files in
#           other modes.
# Seen: it opens as RGB with 8 bits, without a warning: values that differ by less than 257 become equal. The values 0 to 767
#       become three.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 pillow-jxl-plugin==1.3.8 imagecodecs==2026.3.6 numpy==2.4.6

venv/bin/python -W error - <<'PYTHON'
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_jxl  # noqa: F401
from PIL import Image

values = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3)
Path("deep.jxl").write_bytes(imagecodecs.jpegxl_encode(values, lossless=True))
assert (imagecodecs.jpegxl_decode(Path("deep.jxl").read_bytes()) == values).all()
with Image.open("deep.jxl") as image:
    opened = np.asarray(image)
print(f"{len(np.unique(values))} different values of 16 bits are {len(np.unique(opened))} as {image.mode}, {opened.dtype}")
assert image.mode == "RGB" and opened.dtype == np.uint8, "the behaviour changed"
assert len(np.unique(opened)) < 10
PYTHON
