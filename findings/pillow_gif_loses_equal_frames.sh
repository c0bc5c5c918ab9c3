#!/usr/bin/env bash
# Pillow 13.0.0, imageio 2.38.1
# Expected: a GIF of six frames has six frames, as a video of six frames has.
# Seen: frames that are equal to the one before are left out, and their time is added to it: three frames come back. A strip that is
# read frame by frame no longer fits the sequence that it shows. imageio writes GIFs by Pillow and gives three frames too.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 imageio==2.38.1 numpy==2.4.6

cat > gif.py <<'PYTHON'
import io

import imageio.v3 as iio
import numpy as np
from PIL import Image

frames = np.stack([np.full((8, 8), level, np.uint8) for level in (0, 0, 0, 200, 200, 50)])
first, *others = map(Image.fromarray, frames)
buffer = io.BytesIO()
first.save(buffer, "GIF", save_all=True, append_images=others, duration=100)
read = Image.open(buffer)
durations = []
for number in range(read.n_frames):
    read.seek(number)
    durations.append(read.info["duration"])
print("frames:", len(frames), "by Pillow:", read.n_frames, "durations:", durations)
written = iio.imwrite("<bytes>", frames, extension=".gif")
print("by imageio:", len(iio.imread(written, index=None)))
PYTHON
venv/bin/python gif.py | tee output
grep -q '^frames: 6 by Pillow: 3 durations: \[300, 200, 100\]$' output && grep -q '^by imageio: 3$' output ||
    { echo "the behaviour changed" >&2; exit 1; }
