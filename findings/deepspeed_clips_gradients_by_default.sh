#!/usr/bin/env bash
# deepspeed 0.19.8, a configuration that says nothing of `gradient_clipping` (every ZeRO stage; here on a CPU)
# Expected: gradients are clipped when the configuration says so, as torch and accelerate do it, and DeepSpeed did until June 2026 (#8068).
# Seen: the default is a norm of 1.0. A gradient with norm 40 moves the weights by 1 instead of 40, without a word; 0.0 switches it off.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > clip.py <<'PYTHON'
import os

import deepspeed
import torch

deepspeed.init_distributed("gloo")


def moved(stage: int, **more: float) -> float:
    """How far one step of SGD with rate 1 moves weights whose gradient has norm 40."""
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )
    engine.backward(10 * engine(torch.ones(1, 4)).sum())
    engine.step()
    return model.weight.detach().norm().item()


ok = True
for stage in range(3):
    silent, off = moved(stage), moved(stage, gradient_clipping=0.0)
    print(f"stage {stage}: moved by {silent:.3f} with no word on clipping, by {off:.3f} with gradient_clipping 0.0", flush=True)
    ok &= abs(silent - 1) < 1e-3 and abs(off - 40) < 1e-3
os._exit(0 if ok else 1)  # no shutdown of gloo's threads
PYTHON
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29571
export TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH"
venv/bin/python clip.py > log 2>&1 || { tail log >&2; exit 1; }
grep "^stage" log
