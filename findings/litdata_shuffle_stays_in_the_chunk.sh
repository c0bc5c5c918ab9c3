#!/usr/bin/env bash
# litdata 0.2.76
# Expected: StreamingDataset(shuffle=True) mixes samples of different chunks, at least of those that are read together.
# Seen: chunks are permuted, and samples within each chunk. A set that was written class by class is read class by
#       class, in the same runs, at every epoch.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 litdata==0.2.76 numpy==2.4.6

cat > shuffle.py <<'PYTHON'
import os

from litdata import StreamingDataset
from litdata.streaming.writer import BinaryWriter

if __name__ == "__main__":
    os.mkdir("chunks")
    writer = BinaryWriter("chunks", chunk_size=10)
    for number in range(40):
        writer[number] = {"number": number, "label": number // 10}  # four classes, written one after another
    writer.done()
    writer.merge()
    dataset = StreamingDataset("chunks", shuffle=True, seed=1)
    for epoch in range(2):
        samples = [(sample["number"], sample["label"]) for sample in dataset]
        labels = [int(label) for _, label in samples]
        print(f"epoch {epoch}: samples {[int(number) for number, _ in samples]}")
        print(f"  labels {labels}")
        changes = sum(first != second for first, second in zip(labels, labels[1:]))
        assert sorted(int(number) for number, _ in samples) == list(range(40))
        assert changes == 3, f"the behaviour changed: {changes} changes of label"
PYTHON
venv/bin/python shuffle.py
