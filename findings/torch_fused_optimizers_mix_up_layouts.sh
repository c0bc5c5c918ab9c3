#!/usr/bin/env bash
# torch 2.13.0, on a CPU
# Expected: AdamW, SGD and Adagrad update the same with fused=True and without, in whatever memory format weight and gradient lie.
# Seen: with a channels_last weight and a contiguous gradient of the same shape, or the reverse, fused=True silently moves
#       other numbers than those whose gradient it reads: off by as much as the weight has moved. With both in channels_last the numbers are right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch

torch.manual_seed(0)
start, gradient = torch.randn(16, 8, 3, 3), torch.randn(16, 8, 3, 3)
orders = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def moved(kind: str, of_weight: str, of_gradient: str, fused: bool) -> torch.Tensor:
    weight = torch.nn.Parameter(start.clone().contiguous(memory_format=orders[of_weight]))
    weight.grad = gradient.clone().contiguous(memory_format=orders[of_gradient])
    getattr(torch.optim, kind)([weight], lr=0.1, fused=fused).step()
    return weight.detach()


for kind in ("AdamW", "SGD", "Adagrad"):
    expected = moved(kind, "contiguous", "contiguous", fused=False)
    for of_weight in orders:
        for of_gradient in orders:
            assert torch.allclose(moved(kind, of_weight, of_gradient, fused=False), expected, atol=1e-6)
            off = (moved(kind, of_weight, of_gradient, fused=True) - expected).abs().max().item()
            print(f"{kind}, weight {of_weight}, gradient {of_gradient}: fused=True is off by {off:.1g}")
            assert (off > 0.1) == (of_weight != of_gradient), "the behaviour changed"
PYTHON
