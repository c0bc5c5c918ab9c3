#!/usr/bin/env bash
# deepspeed 0.19.8, ZeRO stage 1 on the CPU (compiles a small extension: needs g++ and Python's headers)
# Expected: with bf16 enabled, micro-batch gradients are accumulated in float32, as the master weights are kept.
# Seen: they are accumulated in bfloat16 unless data_types.grad_accum_dtype is fp32. A sum of 512 gradients of 1/512
#       stops at 0.5: beyond it each addend is rounded away.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > accumulate.py <<'PYTHON'
import os

import deepspeed
import torch

deepspeed.init_distributed("gloo")


def trained_weight(data_types):
    """Weight 1 after one SGD step of rate 1 on 512 micro-batches, each with a gradient of 1/512. Exactly 0."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 512,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "data_types": data_types,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    for _ in range(512):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        engine.step()
    return model.weight.item()


default, float32 = trained_weight({}), trained_weight({"grad_accum_dtype": "fp32"})
print(f"weight after a step (exact 0): {default} by default, {float32:.6f} with grad_accum_dtype fp32", flush=True)
os._exit(0 if default == 0.5 and abs(float32) < 1e-3 else 1)  # no shutdown of gloo's threads
PYTHON
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29571
export TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH"
venv/bin/python accumulate.py 2> log | grep "weight after" || { tail log >&2; exit 1; }
