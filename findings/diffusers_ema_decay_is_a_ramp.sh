#!/usr/bin/env bash
# diffusers 0.42.1
# Expected: EMAModel(decay=0.9999) with use_ema_warmup=False, its default, averages with 0.9999 from the first step.
# Seen: the decay is (1 + step) / (10 + step) until it reaches 0.9999, after 90,000 steps. After 1,000 steps it is 0.991:
#       the average is over about 100 steps, not 10,000.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from diffusers.training_utils import EMAModel

parameters = [torch.nn.Parameter(torch.zeros(1))]
average = EMAModel(parameters, decay=0.9999, use_ema_warmup=False)
decays = {}
for step in range(1, 1001):
    average.step(parameters)
    decays[step] = average.cur_decay_value
print({step: round(decays[step], 4) for step in (1, 2, 10, 100, 1000)})
assert decays[1] == 0 and abs(decays[1000] - 1000 / 1009) < 1e-3, "the behaviour changed"
PYTHON
