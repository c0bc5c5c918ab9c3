#!/usr/bin/env bash
# accelerate 1.15.0, two processes
# Expected: scheduler.step() advances the learning rate by one step on any number of processes.
# Seen: a prepared scheduler advances by the number of processes (unless split_batches is set), so that the same recipe
#       ends its warm-up and its decay earlier on more processes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

cat > schedule.py <<'PYTHON'
import os

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
for _ in range(10):
    optimizer.step()
    scheduler.step()
learning_rate = optimizer.param_groups[0]["lr"]
expected = 1 - 10 * accelerator.num_processes / 100
if accelerator.is_main_process:
    print(f"{accelerator.num_processes} processes, learning rate after 10 steps: {learning_rate:.2f}", flush=True)
accelerator.wait_for_everyone()
os._exit(0 if abs(learning_rate - expected) < 1e-9 else 1)  # no shutdown of gloo's threads
PYTHON
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
for processes in 1 2; do
    venv/bin/python -m torch.distributed.run --standalone --nproc_per_node "$processes" schedule.py
done
