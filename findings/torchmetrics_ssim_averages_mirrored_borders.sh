#!/usr/bin/env bash
# torchmetrics 1.9.0, against scikit-image 0.26.0
# Expected: SSIM of two libraries with one window (Gaussian, sigma 1.5, 11 pixels) and one data range is one number: the mean
#           over the places at which the window is within the image, as Wang et al. 2004 define it.
# Seen: torchmetrics mirrors both images at their borders and averages over all pixels. For images of 16x16 pixels the mean
#       differs by more than 0.02; the map that `return_full_image=True` gives agrees away from the border.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6 scikit-image==0.26.0

venv/bin/python - <<'PYTHON'
import numpy as np
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

random = np.random.default_rng(0)
rows, columns = np.mgrid[:16, :16] / 15
image = (0.5 + 0.4 * np.sin(5 * rows) * np.cos(4 * columns)).astype(np.float32)
noisy = np.clip(image + 0.1 * random.standard_normal(image.shape), 0, 1).astype(np.float32)

theirs = structural_similarity(
    image, noisy, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
)
x, y = (torch.from_numpy(values)[None, None] for values in (image, noisy))
mean, everywhere = structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)
inside = everywhere[..., 5:-5, 5:-5].mean()
print(f"scikit-image {theirs:.4f}, torchmetrics {mean.item():.4f}, its map without the border {inside.item():.4f}")
assert abs(inside.item() - theirs) < 1e-4
assert abs(mean.item() - theirs) > 0.02, "the behaviour changed"
PYTHON
