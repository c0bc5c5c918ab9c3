#!/usr/bin/env bash
# torchmetrics 1.9.0
# Expected: without data_range, the SSIM of float images assumes [0, 1], and an image's value does not depend on the
#           images beside it.
# Seen: data_range is taken from the minimum and maximum of the batch. A brighter image beside it changes the SSIM of a
#       dark one from about 0.5 to about 0.8.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

generator = torch.Generator().manual_seed(0)
image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=generator), 64, mode="bilinear")
noisy = (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
brightness = torch.tensor([0.2, 1.0]).reshape(2, 1, 1, 1)
image, noisy = image * brightness, noisy * brightness

alone = ssim(noisy[:1], image[:1]).item()
beside_bright = ssim(noisy, image, reduction="none")[0].item()
fixed = ssim(noisy[:1], image[:1], data_range=1.0).item(), ssim(noisy, image, data_range=1.0, reduction="none")[0].item()
print(f"SSIM of the dark image: alone {alone:.4f}, beside a bright one {beside_bright:.4f}")
print(f"with data_range=1: alone {fixed[0]:.4f}, beside a bright one {fixed[1]:.4f}")
assert abs(fixed[0] - fixed[1]) < 1e-3
assert beside_bright - alone > 0.1, "the behaviour changed"
PYTHON
