"""Small sequences for tests: a bright 3x3 square that moves over 8x8 grey frames and turns back at the walls.

The class is its sideways movement, which no single frame shows.
"""

from pathlib import Path

import numpy as np

from vaescale.data.index import SEQUENCES
from vaescale.data.making.items import Clip, Item
from vaescale.data.making.writing import write_shards

SIZE, LENGTH = 8, 5
CLASSES = ("left", "still", "right")


def write_clips(folder: Path, *, train: int = 64, val: int = 21) -> Path:
    """`train` and `val` below a folder, LENGTH frames a sequence. Returns the folder."""
    for split, count, start in (("train", train, 0), ("val", val, train)):
        items = [Item(f"{number:04d}", *_clip(start + number)) for number in range(count)]
        write_shards(items, folder / split, class_names=CLASSES, made={"kind": SEQUENCES})
    return folder


def _clip(number: int) -> tuple[Clip, int]:
    generator = np.random.Generator(np.random.Philox(key=number))
    place, speed = generator.integers(0, SIZE - 2, 2), generator.integers(-2, 3, 2)
    frames = []
    for _ in range(LENGTH):
        frame = np.full((SIZE, SIZE, 1), 40, np.uint8)
        top, left = np.abs((place + SIZE - 3) % (2 * (SIZE - 3)) - (SIZE - 3))
        frame[top : top + 3, left : left + 3] = 220
        frames.append(frame)
        place = place + speed
    return Clip(tuple(frames)), 1 + int(np.sign(speed[1]))
