#!/usr/bin/env bash
# tfrecord 1.14.6, TFRecord files (BAIR robot pushing, Open X-Embodiment) read without TensorFlow
# Expected: a record whose bytes do not fit the masked CRC-32C beside it raises, as TensorFlow's reader does (DataLossError).
# Seen: the reader reads both checksums of a record over and compares neither. A file with changed bytes gives other pixels and no word.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check numpy==2.4.6 protobuf==6.33.2 crc32c==2.8 setuptools==84.2.1 wheel==0.48.0
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation tfrecord==1.14.6

cat > read.py <<'PYTHON'
import struct
import sys

import crc32c
from tfrecord.reader import tfrecord_loader
from tfrecord.writer import TFRecordWriter


def masked(content: bytes) -> int:
    crc = crc32c.crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def sound(content: bytes) -> bool:
    """The two checksums of the file's only record, by the format's definition."""
    (length,) = struct.unpack("<Q", content[:8])
    sums = struct.unpack("<I", content[8:12]) + struct.unpack("<I", content[12 + length : 16 + length])
    return sums == (masked(content[:8]), masked(content[12 : 12 + length]))


def pixels() -> bytes:
    (record,) = tfrecord_loader("frames", None, {"image": "byte"})
    return bytes(record["image"])


writer = TFRecordWriter("frames")
writer.write({"image": (bytes(range(64)) * 3, "byte")})
writer.close()
content = open("frames", "rb").read()
whole, before = sound(content), pixels()
place = content.index(bytes(range(64))) + 10
open("frames", "wb").write(content[:place] + bytes(4) + content[place + 4 :])
damaged, after = sound(open("frames", "rb").read()), pixels()
changed = sum(a != b for a, b in zip(before, after, strict=True))
print(f"as written: checksums fit {whole}; four bytes zeroed: checksums fit {damaged}, read without a word, {changed} values differ")
sys.exit(0 if whole and not damaged and changed == 4 else 1)
PYTHON
venv/bin/python -W ignore read.py
