#!/usr/bin/env bash
# deepspeed 0.19.8, ZeRO stage 1 on the CPU (compiles a small extension: needs g++ and Python's headers)
# Expected: a model that is not compiled, with torch's AdamW, is trained without torch's compiler.
# Seen: `deepspeed.initialize` asks whether the optimizer may be used with ZeRO. For that it imports DeepSpeed's Muon, whose
#       functions are decorated with torch.compile, and this imports torch._inductor: on every rank, at every start
#       (initialize took 0.9 s on an idle machine with two cores).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > initialize.py <<'PYTHON'
import os
import sys
import time

import deepspeed
import torch

deepspeed.init_distributed("gloo")
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
before = "torch._inductor.compile_fx" in sys.modules
start = time.perf_counter()
deepspeed.initialize(model=model, optimizer=optimizer, config=config)
seconds = time.perf_counter() - start
after = "torch._inductor.compile_fx" in sys.modules
muon = "deepspeed.runtime.zero.muon.original_muon" in sys.modules
print(f"compiler imported before {before}, after {after}, Muon imported {muon}, initialize took {seconds:.1f} s", flush=True)
os._exit(0 if (before, after, muon) == (False, True, True) else 1)  # no shutdown of gloo's threads
PYTHON
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29573
export TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH"
venv/bin/python initialize.py 2> log | grep "compiler imported" || { tail log >&2; exit 1; }
