#!/usr/bin/env bash
# pytorch-msssim 1.0.0
# Expected: SSIM of float images in [0, 1] takes their range, or asks for it, as scikit-image does.
# Seen: the range is 255 by default, whatever the type. The constants of the formula then outweigh the images: two images of independent
# noise in [0, 1] have an SSIM of 0.996, and 0.014 with data_range=1. A loss or a table made so hardly depends on the images.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pytorch-msssim==1.0.0 torch==2.13.0 numpy==2.4.6

cat > noise.py <<'PYTHON'
import torch
from pytorch_msssim import ssim

torch.manual_seed(0)
one, other = torch.rand(2, 4, 3, 64, 64)
print(f"default: {float(ssim(one, other)):.3f} data_range=1: {float(ssim(one, other, data_range=1.0)):.3f}")
PYTHON
venv/bin/python noise.py | tee output
grep -Eq '^default: 0\.99[0-9] data_range=1: -?0\.0[0-9]+$' output || { echo "the behaviour changed" >&2; exit 1; }
