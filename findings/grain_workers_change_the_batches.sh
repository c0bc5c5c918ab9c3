#!/usr/bin/env bash
# grain 0.2.18
# Expected: the number of worker processes changes the speed of mp_prefetch and not which examples share a batch.
# Seen: each worker reads every n-th example and batches its own, so that the batches depend on the number of workers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check grain==0.2.18 numpy==2.4.6

cat > batches.py <<'PYTHON'
import logging

import grain

logging.disable(logging.WARNING)
if __name__ == "__main__":
    batches = grain.MapDataset.range(12).to_iter_dataset().batch(3)
    seen = {0: [batch.tolist() for batch in batches]}
    for workers in (1, 2):
        options = grain.MultiprocessingOptions(num_workers=workers)
        seen[workers] = [batch.tolist() for batch in batches.mp_prefetch(options)]
    for workers, lists in seen.items():
        print(f"{workers} workers: {lists}")
    assert seen[0] == seen[1] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert seen[2] == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]], "the behaviour changed"
PYTHON
venv/bin/python batches.py
