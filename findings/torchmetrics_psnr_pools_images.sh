#!/usr/bin/env bash
# torchmetrics 1.9.0
# Expected: the PSNR of a set of images is the mean of their PSNRs, as papers on videos and compression state it.
# Seen: the squared errors of all images are averaged first, so that the worst images decide: two images of 20 and 60 dB have 23 dB and
# not 40. dim=(1, 2, 3) gives the mean of the images.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6

cat > psnr.py <<'PYTHON'
import torch
from torchmetrics.image import PeakSignalNoiseRatio

truth = torch.zeros(2, 1, 4, 4)
read = truth + torch.tensor([0.1, 0.001])[:, None, None, None]
pooled = PeakSignalNoiseRatio(data_range=1.0)(read, truth)
each = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")(read, truth)
print(f"default: {float(pooled):.2f} dB, over dim: {float(each):.2f} dB")
PYTHON
venv/bin/python psnr.py | tee output
grep -q '^default: 23.01 dB, over dim: 40.00 dB$' output || { echo "the behaviour changed" >&2; exit 1; }
