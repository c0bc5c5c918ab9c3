#!/usr/bin/env bash
# Pillow 13.0.0
# Expected: AVIF at quality 100 without subsampling keeps every value, as the lossless mode of WebP and JPEG XL does.
# Seen: grey images come back exactly, and colours do not: most values of noise are off, by up to 3, because red, green and blue become
# luma and chroma of 8 bits. There is no option that says lossless. A codec comparison must compare what it decodes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

cat > avif.py <<'PYTHON'
import io

import numpy as np
from PIL import Image


def errors(values, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    read = np.asarray(Image.open(buffer))
    wrong = np.abs(read.astype(int) - values)
    return f"{(wrong > 0).mean():.2f} wrong, by up to {wrong.max()}"


colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
print("grey:", errors(colours[..., 0], "AVIF", quality=100))
print("colours, 4:4:4:", errors(colours, "AVIF", quality=100, subsampling="4:4:4"))
print("WebP:", errors(colours, "WEBP", lossless=True))
PYTHON
venv/bin/python avif.py | tee output
grep -q '^grey: 0.00 wrong, by up to 0$' output && grep -q '^WebP: 0.00 wrong' output &&
    grep -Eq '^colours, 4:4:4: 0\.[4-9][0-9] wrong, by up to [1-9]$' output ||
    { echo "the behaviour changed" >&2; exit 1; }
