#!/usr/bin/env bash
# diffusers 0.42.1
# Expected: in train mode, AutoencoderKL's forward decodes a draw from the posterior, as a VAE in training does.
# Seen: sample_posterior defaults to False in train mode too: forward decodes the posterior's mode, and a training loop
#       that calls model(x) trains an autoencoder without noise.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from diffusers import AutoencoderKL

torch.manual_seed(0)
model = AutoencoderKL(block_out_channels=(32,)).train()
x = torch.randn(1, 3, 16, 16)
with torch.no_grad():
    default = [model(x).sample for _ in range(2)]
    sampled = [model(x, sample_posterior=True).sample for _ in range(2)]
print(f"two passes in train mode are equal: {torch.equal(*default)}; with sample_posterior: {torch.equal(*sampled)}")
assert not torch.equal(*sampled)
assert torch.equal(*default), "the behaviour changed"
PYTHON
