#!/usr/bin/env bash
# ema-pytorch 0.8.3
# Expected: EMA(model, beta=0.99) averages the weights over about the last 100 calls of update().
# Seen: only every tenth call counts (update_every=10), so that the average reaches over 1,000: after a step of the weights it takes 991
# calls to come within 1/e of them, and 100 with update_every=1. Decays of papers, which are for each step, are taken to the tenth root.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check ema-pytorch==0.8.3 torch==2.13.0 numpy==2.4.6

cat > ema.py <<'PYTHON'
import math

import torch
from ema_pytorch import EMA


def calls(**options):
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    average = EMA(model, beta=0.99, **options)
    for _ in range(2000):
        average.update()
    model.weight.data.fill_(1.0)
    number = 0
    while float(average.ema_model.weight) < 1 - 1 / math.e:
        average.update()
        number += 1
    return number


print("default:", calls(), "update_every=1:", calls(update_every=1))
PYTHON
venv/bin/python ema.py | tee output
grep -q '^default: 991 update_every=1: 100$' output || { echo "the behaviour changed" >&2; exit 1; }
