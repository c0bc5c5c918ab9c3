#!/usr/bin/env bash
# vector-quantize-pytorch 1.32.0
# Expected: in eval mode VectorQuantize returns the commitment loss of the batch, so that validation loss compares with
#           training loss.
# Seen: the loss is 0 in eval mode, whatever the distance to the codes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vector-quantize-pytorch==1.32.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from vector_quantize_pytorch import VectorQuantize

torch.manual_seed(0)
quantizer = VectorQuantize(dim=8, codebook_size=16)
x = torch.randn(4, 10, 8)
losses = {}
for mode in (True, False):
    quantized, _, loss = quantizer.train(mode)(x)
    distance = (quantized - x).square().mean().item()
    losses[mode] = loss.item()
    print(f"{'train' if mode else 'eval'}: loss {losses[mode]:.4f}, mean squared distance to the codes {distance:.4f}")
assert losses[True] > 0 and distance > 0.1
assert losses[False] == 0, "the behaviour changed"
PYTHON
