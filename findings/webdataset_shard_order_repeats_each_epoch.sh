#!/usr/bin/env bash
# webdataset 1.0.2
# Expected: shardshuffle draws a new order of shards for each pass over the data set; a seed makes the sequence of
#           orders reproducible.
# Seen: every pass has the same order, with a seed and without one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import webdataset

for number in range(16):
    with webdataset.TarWriter(f"{number:02d}.tar") as writer:
        writer.write({"__key__": f"{number:02d}", "label": str(number).encode()})

for seed in (None, 1):
    options = {} if seed is None else {"seed": seed}
    dataset = webdataset.WebDataset("{00..15}.tar", shardshuffle=16, **options)
    orders = [[int(sample["__key__"]) for sample in dataset] for _ in range(3)]
    print(f"seed {seed}:", *orders, sep="\n  ")
    assert orders[0] != sorted(orders[0]), "the shards are not shuffled"
    assert orders[0] == orders[1] == orders[2], "the behaviour changed"
PYTHON
