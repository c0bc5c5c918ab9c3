#!/usr/bin/env bash
# prdc 0.2
# Expected: precision, recall, density and coverage of a set against itself are 1.
# Seen: where each sample occurs more often than nearest_k, all four are 0: the radius of a neighbourhood is 0, and a
#       distance must be smaller than the radius. Samples of a collapsed model have such repeats.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check prdc==0.2 scikit-learn==1.9.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import numpy as np
from prdc import compute_prdc

distinct = np.random.default_rng(0).normal(size=(20, 8))
repeated = np.repeat(distinct, 10, axis=0)
of_distinct = compute_prdc(distinct, distinct.copy(), nearest_k=5)
of_repeated = compute_prdc(repeated, repeated.copy(), nearest_k=5)
print("a set against itself:", {name: float(value) for name, value in of_distinct.items()})
print("each sample ten times:", {name: float(value) for name, value in of_repeated.items()})
assert of_distinct["precision"] == of_distinct["recall"] == 1
assert set(of_repeated.values()) == {0}, "the behaviour changed"
PYTHON
