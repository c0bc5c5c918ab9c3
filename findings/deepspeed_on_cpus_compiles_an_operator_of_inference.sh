#!/usr/bin/env bash
# deepspeed 0.19.8, training on the CPU (compiles a small extension: needs g++ and Python's headers)
# Expected: init_distributed() starts gloo, and training's collectives are the only ones that a start prepares.
# Seen: it compiles `deepspeed_shm_comm`, an all-reduce in shared memory, before training begins (a minute or more, and a C++
#       compiler is needed). Only inference_all_reduce calls it; a step of ZeRO does not, as a count of its calls shows.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > count.py <<'PYTHON'
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend

calls = []
original = TorchBackend.inference_all_reduce
TorchBackend.inference_all_reduce = lambda *given, **named: calls.append(1) or original(*given, **named)

deepspeed.init_distributed("gloo")
built = sorted(path.name for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so"))
model = torch.nn.Linear(8, 8)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
before = model.weight.detach().clone()
for _ in range(3):
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
trained = not torch.equal(before, model.weight)
print(f"compiled at the start: {', '.join(built)}; calls in 3 steps of ZeRO-2: {len(calls)}; weights moved: {trained}", flush=True)
os._exit(0 if built == ["deepspeed_shm_comm.so"] and not calls and trained else 1)  # no shutdown of gloo's threads
PYTHON
export DS_ACCELERATOR=cpu LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29573
export TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH"
RANK=1 LOCAL_RANK=1 venv/bin/python count.py > other 2>&1 &
RANK=0 venv/bin/python count.py > log 2>&1 && grep "compiled at the start" log || { tail log >&2; exit 1; }
wait
