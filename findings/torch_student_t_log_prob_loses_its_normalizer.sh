#!/usr/bin/env bash
# torch 2.13.0
# Expected: StudentT.log_prob in float32 is correct to about 1e-6 and approaches the Gaussian as df grows.
# Seen: two large lgamma values cancel. The error is 0.005 nats a value at df = 1e4 and 0.08 at 1e6; from 1e7 on the
#       normalizer is gone and log_prob(0) is 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from torch.distributions import StudentT

errors = {}
for df in (1e2, 1e4, 1e6, 1e7):
    single = StudentT(torch.tensor(df)).log_prob(torch.tensor(0.0)).item()
    double = StudentT(torch.tensor(df, dtype=torch.float64)).log_prob(torch.tensor(0.0, dtype=torch.float64)).item()
    errors[df] = abs(single - double)
    print(f"df {df:8.0e}: float32 {single:.6f}, float64 {double:.6f}")
assert errors[1e2] < 1e-4
assert errors[1e4] > 1e-3 and errors[1e6] > 0.05 and errors[1e7] > 0.9, f"the behaviour changed: {errors}"
PYTHON
