#!/usr/bin/env bash
# pyoxipng 9.1.1, Pillow 13.0.0
# Expected: PNG files that oxipng has made smaller open as the same array, because it is lossless.
# Seen: the picture is the same and the array is not. Grey pictures that were RGB open as [H, W], pictures of few colours as numbers of
# a palette, black and white ones as True and False in place of 0 and 255: a folder of RGB files becomes a mixture of four kinds.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pyoxipng==9.1.1 pillow==13.0.0 numpy==2.4.6

cat > smaller.py <<'PYTHON'
import io

import numpy as np
import oxipng
from PIL import Image

random = np.random.default_rng(0)
grey = random.integers(0, 256, (8, 8), dtype=np.uint8)
palette = random.integers(0, 256, (4, 3), dtype=np.uint8)
pictures = {
    "grey": np.stack([grey] * 3, axis=-1),
    "few colours": palette[random.integers(0, 4, (32, 32))],
    "black and white": np.where(random.random((32, 32, 1)) > 0.5, 255, 0).astype(np.uint8).repeat(3, axis=-1),
}
for name, values in pictures.items():
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    read = Image.open(io.BytesIO(oxipng.optimize_from_memory(buffer.getvalue(), level=4)))
    array = np.asarray(read)
    same = np.array_equal(np.asarray(read.convert("RGB")), values)
    print(f"{name}: {list(values.shape)} uint8 -> {list(array.shape)} {array.dtype} up to {int(array.max())}, mode {read.mode}, picture the same: {same}")
PYTHON
venv/bin/python smaller.py | tee output
grep -q '^grey: \[8, 8, 3\] uint8 -> \[8, 8\] uint8 .* mode L, picture the same: True$' output &&
    grep -q '^few colours: .* -> \[32, 32\] uint8 up to 3, mode P, picture the same: True$' output &&
    grep -q '^black and white: .* -> \[32, 32\] bool up to 1, mode 1, picture the same: True$' output ||
    { echo "the behaviour changed" >&2; exit 1; }
