#!/usr/bin/env bash
# torch 2.13.0, autocast on the CPU
# Expected: losses are computed in float32 under autocast, gaussian_nll_loss as mse_loss is.
# Seen: mse_loss returns float32. gaussian_nll_loss, Normal.log_prob and kl_divergence of bfloat16 tensors return
#       bfloat16, which keeps 8 bits of a sum of thousands of nats.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import gaussian_nll_loss, mse_loss

linear = torch.nn.Linear(64, 64)
with torch.autocast("cpu", torch.bfloat16):
    mean = linear(torch.zeros(2, 64))
    target, variance = torch.zeros_like(mean), torch.ones_like(mean)
    decoded, prior = Normal(mean, variance), Normal(target, variance)
    seen = {
        "mse_loss": mse_loss(mean, target).dtype,
        "gaussian_nll_loss": gaussian_nll_loss(mean, target, variance).dtype,
        "Normal.log_prob": decoded.log_prob(target).dtype,
        "kl_divergence": kl_divergence(decoded, prior).dtype,
    }
print(seen)
assert seen.pop("mse_loss") == torch.float32
assert set(seen.values()) == {torch.bfloat16}, "the behaviour changed"
PYTHON
