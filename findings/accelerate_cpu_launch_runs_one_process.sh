#!/usr/bin/env bash
# accelerate 1.15.0
# Expected: accelerate launch --cpu --num_processes 2 starts two processes, or refuses.
# Seen: one process runs. The launcher lists other options that have defaults, and nothing about the second process.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

cat > count.py <<'PYTHON'
from accelerate import Accelerator

print("processes:", Accelerator(cpu=True).num_processes)
PYTHON
venv/bin/accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    count.py | tee output
test "$(grep -c '^processes: 1$' output)" = 1 || { echo "the behaviour changed" >&2; exit 1; }
