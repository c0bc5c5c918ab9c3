#!/usr/bin/env bash
# accelerate 1.15.0 with webdataset 1.0.2, two processes
# Expected: prepare() leaves a stream alone that split_by_node has already divided, or says that it divides it again.
# Seen: it gives each process every second batch of that process's own half: 16 of 32 samples are never read, silently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 webdataset==1.0.2 numpy==2.4.6

cat > stream.py <<'PYTHON'
import os

import torch.distributed as dist
import webdataset
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True)
if accelerator.is_main_process:
    for shard in range(4):
        with webdataset.TarWriter(f"{shard}.tar") as writer:
            for number in range(8 * shard, 8 * shard + 8):
                writer.write({"__key__": f"{number:02d}", "label": str(number).encode()})
accelerator.wait_for_everyone()


def read(prepare):
    split = webdataset.WebDataset("{0..3}.tar", shardshuffle=False, nodesplitter=webdataset.split_by_node)
    loader = DataLoader(split.map(lambda sample: int(sample["__key__"])), batch_size=2)
    numbers = [int(number) for batch in (accelerator.prepare(loader) if prepare else loader) for number in batch]
    gathered = [None, None]
    dist.all_gather_object(gathered, numbers)
    return sorted(gathered[0] + gathered[1])


plain, prepared = read(prepare=False), read(prepare=True)
if accelerator.is_main_process:
    print(f"{accelerator.num_processes} processes, plain loader: {len(plain)} samples {plain}")
    print(f"prepared loader: {len(prepared)} samples {prepared}", flush=True)
as_stated = plain == list(range(32)) and len(prepared) == len(set(prepared)) == 16
accelerator.wait_for_everyone()
os._exit(0 if as_stated else 1)  # no shutdown of gloo's threads
PYTHON
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 stream.py
