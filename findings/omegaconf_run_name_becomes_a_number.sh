#!/usr/bin/env bash
# omegaconf 2.4.0
# Expected: on a command line, run=20261127_142530 is a name, seed=012 is 12 and at=1:30 is text.
# Seen: YAML 1.1 rules apply: underscores are dropped from numbers, a leading zero means octal, colons mean base 60.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check omegaconf==2.4.0

venv/bin/python - <<'PYTHON'
from omegaconf import OmegaConf

config = OmegaConf.from_dotlist(["run=20261127_142530", "seed=012", "at=1:30", "shuffle=no"])
seen = OmegaConf.to_container(config)
print(seen)
expected_if_unchanged = {"run": 20261127142530, "seed": 10, "at": 90, "shuffle": False}
assert seen == expected_if_unchanged, "the behaviour changed"
PYTHON
