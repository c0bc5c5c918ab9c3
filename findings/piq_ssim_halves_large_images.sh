#!/usr/bin/env bash
# piq 0.8.0, structural similarity of images larger than 256 pixels
# Expected: piq.ssim(x, y) is the SSIM of Wang et al. 2004 of the images that it is given, as scikit-image computes it.
# Seen: by default it averages an image of n pixels over blocks of round(n / 256) first, which removes noise. For one kind of picture with
#       noise it is 0.204 at 256 pixels, as scikit-image says, and 0.512 at 384 pixels where that says 0.176. With downsample=False both agree.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 scikit-image==0.26.0
venv/bin/pip install --quiet --disable-pip-version-check --no-deps piq==0.8.0

cat > compare.py <<'PYTHON'
import importlib
import sys
import types
from importlib.metadata import distribution

import numpy as np
import torch
from skimage.metrics import structural_similarity

# piq's own __init__ loads networks of torchvision, which this needs as little as ssim.py does.
package = types.ModuleType("piq")
package.__path__ = [str(distribution("piq").locate_file("piq"))]
sys.modules["piq"] = package
ssim = importlib.import_module("piq.ssim").ssim

ok = True
for size in (128, 256, 384, 512):
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.random((size, size)) - 0.5, 0), 1)
    image = ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)
    noisy = np.clip(image + 0.1 * rng.standard_normal(image.shape), 0, 1).astype(np.float32)
    reference = structural_similarity(
        image, noisy, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    pair = [torch.from_numpy(array)[None, None] for array in (image, noisy)]
    default, whole = (float(ssim(*pair, data_range=1.0, **more)) for more in ({}, {"downsample": False}))
    print(f"{size} pixels: piq {default:.4f}, with downsample=False {whole:.4f}, scikit-image {reference:.4f}")
    ok &= abs(whole - reference) < 1e-3
    ok &= (default - reference > 0.1) if size > 256 else abs(default - reference) < 1e-3
sys.exit(0 if ok else 1)
PYTHON
venv/bin/python compare.py
