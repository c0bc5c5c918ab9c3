#!/usr/bin/env bash
# accelerate 1.15.0
# Expected: with total_limit=1 the previous checkpoint is deleted after the next one is complete.
# Seen: it is deleted first. If the save then fails, only an incomplete checkpoint remains.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import os

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration


class Failing:
    """An object whose state cannot be saved, as on a full disk."""

    def state_dict(self):
        raise OSError("no space left")

    def load_state_dict(self, state):
        pass


project = ProjectConfiguration("project", automatic_checkpoint_naming=True, total_limit=1)
accelerator = Accelerator(cpu=True, project_config=project)
accelerator.prepare(torch.nn.Linear(2, 2))
accelerator.save_state()
before = os.listdir("project/checkpoints")
accelerator.register_for_checkpointing(Failing())
try:
    accelerator.save_state()
except OSError as error:
    print(f"the second save fails: {error}")
after = os.listdir("project/checkpoints")
print(f"checkpoints before it: {before}, after it: {after}")
assert before == ["checkpoint_0"]
assert "checkpoint_0" not in after, "the behaviour changed"
PYTHON
