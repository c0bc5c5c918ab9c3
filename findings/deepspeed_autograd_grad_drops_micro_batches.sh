#!/usr/bin/env bash
# deepspeed 0.19.8, ZeRO on the CPU, one process (compiles a small extension: needs g++ and Python's headers)
# Expected: torch.autograd.grad on the engine's loss, before engine.backward, returns a gradient and leaves the step alone.
# Seen: hooks on the output of engine(...) treat the call as a backward pass of training. With ZeRO-1, a call in the last
#       micro-batch reduces the gradients of the earlier ones; engine.backward then overwrites them without a message, and
#       the step uses the last micro-batch only. With ZeRO-2 the call raises IndexError. With ZeRO-3 the step here is right.
#       ZeRO-1 and ZeRO-3 return the gradient divided by gradient_accumulation_steps. The same call within the module's
#       forward, before the hooks exist, gives the right gradient and the right step. The documentation (read at
#       0.19.6) says that tensor.backward() is supported and does not mention autograd.grad.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > gradients.py <<'PYTHON'
import os

import deepspeed
import torch

deepspeed.init_distributed("gloo")


def gradient_of(tensor, loss):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0].item()


class Loss(torch.nn.Module):
    """weight * x with a weight of 1. The gradient of the weight is x; the forward pass computes it too if asked to."""

    def __init__(self, ask):
        super().__init__()
        self.weight, self.ask, self.returned = torch.nn.Parameter(torch.ones(1)), ask, []

    def forward(self, x):
        loss = (self.weight * x).sum()
        if self.ask:
            self.returned.append(gradient_of(self.weight, loss))
        return loss


def step(stage, asked):
    """The gradient's norm in a step of two micro-batches with gradients 1 and 10 (exact 5.5), and what was returned."""
    model = Loss(ask=asked == "weight, in forward")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    for x in torch.tensor([1.0, 10.0]):
        x.requires_grad_(asked == "input")
        loss = engine(x)
        if asked in ("weight", "input"):
            model.returned.append(gradient_of(model.weight if asked == "weight" else x, loss))
        engine.backward(loss)
        engine.step()
    return float(engine.get_global_grad_norm()), model.returned


right = {"nothing": (5.5, []), "weight, in forward": (5.5, [1, 10])}
expected_if_unchanged = {
    1: right | {"weight": (5, [0.5, 5]), "input": (5, [0.5, 0.5])},
    2: right | {"weight": "IndexError", "input": "IndexError"},
    3: right | {"weight": (5.5, [0.5, 5]), "input": (5.5, [0.5, 0.5])},
}
changed = False
for stage, cases in expected_if_unchanged.items():
    for asked, expected in cases.items():
        try:
            seen = step(stage, asked)
        except IndexError:
            seen = "IndexError"
        print(f"ZeRO-{stage}, gradient of {asked}: {seen}", flush=True)
        changed |= seen != expected
os._exit(changed)  # no shutdown of gloo's threads
PYTHON
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29575
export TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH"
echo "norm of the step's gradient (exact 5.5), gradients that autograd.grad returned in its two micro-batches"
venv/bin/python gradients.py 2> log | grep "^ZeRO-" || { tail log >&2; exit 1; }
