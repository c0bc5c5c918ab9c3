#!/bin/sh
# Remove from a virtual environment what no run reads, then compile the rest: prune.sh VENV
# Compile alone, where headers and compilers have to stay: prune.sh VENV --keep
set -eu

packages=$(echo "$1"/lib/python3*/site-packages)

# A container's file system is read-only or belongs to another user, so Python could not keep what it compiles at a start.
# Hashes of files are not checked at an import, so times may change when layers are copied. Left out: the networks of
# transformers and torch's own test code, which no run imports (and which may be written for a newer Python).
compile_packages() {
    find "$packages" -depth -type d -name __pycache__ -exec rm -rf {} +
    "$1/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        -x '/transformers/models/|/torch/testing/_internal/' "$packages"
}

if [ "${2:-}" = --keep ]; then
    compile_packages "$1"
    exit
fi

if [ -d "$packages/torch" ]; then
    # Tests, headers and protoc. torch_shm_manager stays: processes that share tensors start it.
    rm -rf "$packages/torch/test" "$packages/torch/include" "$packages/torch/share"
    find "$packages/torch/bin" -mindepth 1 ! -name torch_shm_manager -delete
fi
# Headers, sources and example data of others.
rm -rf "$packages/pyarrow/include" "$packages/pyarrow/src" "$packages/numpy/_core/include" \
    "$packages/matplotlib/mpl-data/sample_data" "$packages/sklearn/datasets/images"
find "$packages" -name '*.a' -delete
# Tests of libraries. vaescale has none inside its package.
for library in deepspeed matplotlib mpmath networkx numpy pandas pyarrow scipy sklearn sympy; do
    test ! -d "$packages/$library" || find "$packages/$library" -depth -type d -name tests -exec rm -rf {} +
done
rm -rf "$packages"/ninja* "$1/bin/ninja"  # nothing is compiled at a start

compile_packages "$1"
