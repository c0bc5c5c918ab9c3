#!/usr/bin/env bash
# torch 2.13.0, two processes over gloo
# Expected: DistributedDataParallel raises in the first backward pass in which a parameter has no gradient.
# Seen: the first backward pass ends normally with each rank's own gradient, not averaged; an optimizer step there lets
#       the replicas drift apart. The error comes with the second forward pass.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > unused.py <<'PYTHON'
import os

import torch
import torch.distributed as dist


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.used * x


dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(Scale())
x = torch.tensor([1.0 + dist.get_rank()])
model(x).sum().backward()
gradients = [None, None]
dist.all_gather_object(gradients, model.module.used.grad.item())
try:
    model(x)
    error = "none"
except RuntimeError as raised:
    error = str(raised).split(".")[0]
if dist.get_rank() == 0:
    print(f"gradients after the first backward pass: {gradients} (the average is 1.5)")
    print(f"error in the second forward pass: {error}", flush=True)
as_stated = gradients == [1.0, 2.0] and error.startswith("Expected to have finished reduction")
dist.barrier()
os._exit(0 if as_stated else 1)  # no shutdown of gloo's threads
PYTHON
OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 unused.py
