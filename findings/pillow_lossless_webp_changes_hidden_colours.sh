#!/usr/bin/env bash
# Pillow 13.0.0
# Expected: WebP with lossless=True keeps every value of an RGBA image.
# Seen: colours of pixels whose alpha is 0 are replaced by others, here a third of all values; exact=True keeps them. A model of four channels
# that trains on such files sees them, as nothing hides them there.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

cat > hidden.py <<'PYTHON'
import io

import numpy as np
from PIL import Image

random = np.random.default_rng(0)
values = random.integers(0, 256, (16, 16, 4), dtype=np.uint8)
values[..., 3] = np.where(random.random((16, 16)) > 0.5, 255, 0)
for exact in (False, True):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "WEBP", lossless=True, exact=exact)
    wrong = np.asarray(Image.open(buffer)) != values
    print(f"exact={exact}: {wrong.mean():.2f} of the values changed, {int(wrong[values[..., 3] == 255].sum())} of visible pixels")
PYTHON
venv/bin/python hidden.py | tee output
grep -Eq '^exact=False: 0\.[1-9][0-9] of the values changed, 0 of visible pixels$' output &&
    grep -q '^exact=True: 0.00 of the values changed, 0 of visible pixels$' output || { echo "the behaviour changed" >&2; exit 1; }
