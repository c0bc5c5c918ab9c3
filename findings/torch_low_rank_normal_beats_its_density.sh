#!/usr/bin/env bash
# torch 2.13.0, LowRankMultivariateNormal.log_prob in float32 (covariances W W' + D of decoders with correlated residuals)
# Expected: the Woodbury identity in float32 is right to some 1e-4, as the Cholesky form is, however small the noise D beside W.
# Seen: the Mahalanobis term is a difference of two large numbers. With 784 values, rank 10 and noise of 0.01 beside loadings of 1 the
#       log-density of one draw is off by 5 to 72 nats, with noise of 0.003 by 120 to 460, in either direction. In float64 it agrees to 1e-5.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > density.py <<'PYTHON'
import sys

import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal


def log_probs(noise: float, seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Of one draw: by the low-rank class in a dtype, and by the whole covariance in float64."""
    torch.manual_seed(seed)
    loadings, diagonal = torch.randn(784, 10), torch.full((784,), noise**2)
    mean = torch.zeros(784)
    covariance = loadings.double() @ loadings.double().T + torch.diag(diagonal.double())
    whole = MultivariateNormal(mean.double(), covariance)
    x = whole.sample().float()  # the same values for both
    low_rank = LowRankMultivariateNormal(mean.to(dtype), loadings.to(dtype), diagonal.to(dtype))
    return low_rank.log_prob(x.to(dtype)).item(), whole.log_prob(x.double()).item()


ok = True
for noise, least in ((0.1, 0.0), (0.01, 0.1), (0.003, 5.0), (0.001, 50.0)):
    errors = [a - b for a, b in (log_probs(noise, seed, torch.float32) for seed in range(4))]
    double = max(abs(a - b) for a, b in (log_probs(noise, seed, torch.float64) for seed in range(4)))
    print(f"noise {noise}: float32 is off by {', '.join(f'{error:+.2f}' for error in errors)} nats, float64 by {double:.0e}")
    ok &= max(abs(error) for error in errors) >= least and double < 1e-3
sys.exit(0 if ok else 1)
PYTHON
venv/bin/python density.py
