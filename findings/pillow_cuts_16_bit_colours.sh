#!/usr/bin/env bash
# Pillow 13.0.0
# Expected: a PNG of 16 bits a colour opens with 16 bits, as a grey one does, or is refused.
# Seen: it opens as RGB of 8 bits, the upper halves, without a warning, while grey keeps its 16 bits. So a set of deep colours trains as
# one of 256 levels, and its bits per dimension are of the wrong depth.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

cat > deep.py <<'PYTHON'
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

warnings.simplefilter("error")


def png(values):
    """A PNG of 16 bits: uint16 [H, W] or [H, W, 3]."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


colours = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
for name, values in (("grey", colours[..., 0]), ("colours", colours)):
    read = np.asarray(Image.open(io.BytesIO(png(values))))
    print(f"{name}: {read.dtype}, equal: {np.array_equal(read, values)}, upper halves: {np.array_equal(read, values >> 8)}")
PYTHON
venv/bin/python deep.py | tee output
grep -q '^grey: uint16, equal: True, upper halves: False$' output &&
    grep -q '^colours: uint8, equal: False, upper halves: True$' output || { echo "the behaviour changed" >&2; exit 1; }
