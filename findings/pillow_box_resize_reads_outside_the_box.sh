#!/usr/bin/env bash
# Pillow 13.0.0
# Expected: resize(size, box=box) equals crop(box).resize(size): only pixels within the box count.
# Seen: the filter also reads pixels outside the box. A black box beside white pixels is not black.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import numpy as np
from PIL import Image

pixels = np.zeros((20, 20), np.uint8)
pixels[:, :10] = 255
image, box = Image.fromarray(pixels), (10, 0, 20, 20)  # the box is the black half
boxed = np.asarray(image.resize((5, 10), Image.Resampling.BICUBIC, box=box))
cropped = np.asarray(image.crop(box).resize((5, 10), Image.Resampling.BICUBIC))
print(f"brightest pixel: crop, then resize {cropped.max()}; resize with a box {boxed.max()}")
assert cropped.max() == 0 and boxed.max() > 0, "the behaviour changed"
PYTHON
