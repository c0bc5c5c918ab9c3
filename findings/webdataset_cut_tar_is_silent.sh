#!/usr/bin/env bash
# webdataset 1.0.2
# Expected: an archive without its end marker, as an interrupted copy leaves it, raises an error.
# Seen: where the copy stops after a whole member, the shard only becomes shorter. If that member is an image whose
#       label was to follow, the last sample arrives without a label. A cut within a member's data does raise.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import tarfile

import webdataset

with webdataset.TarWriter("whole.tar") as writer:
    for number in range(20):
        writer.write({"__key__": f"{number:02d}", "image": bytes(512), "label": str(number).encode()})

with tarfile.open("whole.tar") as tar:
    kept_bytes = tar.getmember("10.label").offset  # the copy stops before the label of the eleventh sample
with open("whole.tar", "rb") as whole, open("cut.tar", "wb") as cut:
    cut.write(whole.read(kept_bytes))

samples = list(webdataset.WebDataset("cut.tar", shardshuffle=False))
complete = sum("label" in sample for sample in samples)
print(f"{len(samples)} of 20 samples arrived without an error, {complete} of them with a label")
assert (len(samples), complete) == (11, 10), "the behaviour changed"
PYTHON
