#!/usr/bin/env bash
# accelerate 1.15.0
# Expected: an explicit Accelerator(gradient_accumulation_steps=1) wins over a variable that a launcher left behind.
# Seen: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 wins, silently: backward() divides the loss by 4, for a loop that does
#       not accumulate too.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import os

os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
weight = torch.ones(1, requires_grad=True)
accelerator.backward(weight.sum())
print(f"gradient_accumulation_steps {accelerator.gradient_accumulation_steps}, gradient {weight.grad.item()} (exact 1)")
assert weight.grad.item() == 0.25, "the behaviour changed"
PYTHON
