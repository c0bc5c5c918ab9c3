#!/usr/bin/env bash
# datasets 5.2.0, its webdataset builder
# Expected: a caption that only some samples of a tar have becomes a column with None where it is missing.
# Seen: the columns are those of the first five samples. A field that appears later is dropped without a message.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0

venv/bin/python - <<'PYTHON'
import io
import os
import tarfile

os.environ["HF_HOME"] = os.getcwd()
import datasets

datasets.disable_progress_bars()
with tarfile.open("shard.tar", "w") as tar:
    for number in range(12):
        fields = {"cls": str(number)} | ({"txt": f"caption {number}"} if number >= 6 else {})
        for field, text in fields.items():
            member = tarfile.TarInfo(f"{number:02d}.{field}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))

shard = datasets.load_dataset("webdataset", data_files={"train": "shard.tar"}, split="train")
print(f"{len(shard)} samples, columns {sorted(shard.column_names)}; six samples have a caption in the tar")
assert len(shard) == 12 and "cls" in shard.column_names
assert "txt" not in shard.column_names, "the behaviour changed"
PYTHON
