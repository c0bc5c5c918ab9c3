#!/usr/bin/env bash
# safetensors 0.8.0, its numpy interface
# Expected: an array that is not C-contiguous (a transpose, a Fortran-ordered one) is stored by value or refused, as
#           safetensors.torch refuses it.
# Seen: its memory is written in memory order: the file has the right shape and the wrong values, without a message.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import numpy as np
from safetensors.numpy import load_file, save_file

matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {"transpose": matrix.T, "fortran": np.asfortranarray(matrix)}
save_file(arrays, "arrays.safetensors")
loaded = load_file("arrays.safetensors")
for name, array in arrays.items():
    print(f"{name}: saved {array.tolist()}\n  loaded {loaded[name].tolist()}")
    assert loaded[name].shape == array.shape
    assert not np.array_equal(loaded[name], array), "the behaviour changed"
PYTHON
