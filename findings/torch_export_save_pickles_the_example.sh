#!/usr/bin/env bash
# torch 2.13.0
# Expected: torch.export.save writes a program: its graph, its weights and its constants.
# Seen: the .pt2 archive also holds the example input that the program was traced with, as a pickle: an image that was taken from
#       private data is in the file that is published. Without `example_inputs` the member is empty.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import io
import zipfile

import torch

MEMBER = "data/sample_inputs/model.pt"


def member(program):
    stored = io.BytesIO()
    torch.export.save(program, stored)
    archive = zipfile.ZipFile(stored)
    (name,) = (name for name in archive.namelist() if name.endswith(MEMBER))
    return archive.read(name)


private = torch.full((2, 3), 0.625)
program = torch.export.export(torch.nn.Linear(3, 2), (private,))
content = member(program)
inside = zipfile.ZipFile(io.BytesIO(content)).namelist()
(arguments, _) = torch.load(io.BytesIO(content), weights_only=True)
print("members of", MEMBER, inside)
print("the example in the file:", arguments[0].tolist())
program.example_inputs = None
print("bytes without it:", len(member(program)))
assert "archive/data.pkl" in inside and torch.equal(arguments[0], private), "the behaviour changed"
assert member(program) == b"", "the behaviour changed"
PYTHON
