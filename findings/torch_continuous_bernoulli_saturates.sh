#!/usr/bin/env bash
# torch 2.13.0
# Expected: ContinuousBernoulli(logits=...) works with the logits, so that log_prob, mean and gradient are right for
#           the saturated pixels that black and white images have.
# Seen: in float32 the logits pass through a probability that is at most 1 - 1.2e-7. Beyond a logit of 16 the density
#       stops growing (0.63 nats a pixel are missing at 30), the mean is wrong and the gradient is 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import math

import torch
from torch.distributions import ContinuousBernoulli

for value in (8.0, 30.0):
    logit = torch.tensor(value, requires_grad=True)
    distribution = ContinuousBernoulli(logits=logit)
    log_prob = distribution.log_prob(torch.tensor(1.0))
    log_prob.backward()
    exact = math.log(value) - math.log1p(-math.exp(-value))  # density of x = 1: t / (1 - exp(-t))
    exact_gradient = 1 / value - 1 / math.expm1(value)
    exact_mean = -1 / math.expm1(-value) - 1 / value
    print(f"logit {value:.0f}: log_prob(1) {log_prob.item():.4f} (exact {exact:.4f}), gradient {logit.grad.item():.4f}", end=" ")
    print(f"(exact {exact_gradient:.4f}), mean {distribution.mean.item():.4f} (exact {exact_mean:.4f})")
    error = abs(log_prob.item() - exact)
    assert error < 1e-3 if value == 8 else (error > 0.6 and logit.grad == 0), "the behaviour changed"
PYTHON
