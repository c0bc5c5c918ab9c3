"""`moving-mnist:PATH`: two digits that move and bounce, sequences of frames. Srivastava et al. 2015; stochastic: Denton & Fergus 2018.

A digit moves by a constant number of pixels per frame until it meets a wall of the frame. Stochastic, it stays at the wall for that
frame and leaves it with a new random velocity; deterministic, it is reflected as by a mirror. Where digits overlap, their
brightness adds up to white at most.

All choices are Philox words of a counter (event, sequence, digit, split): a sequence is the same whichever are made beside it. Event 0
chooses the digit and its place, event 1 the first velocity, event 1 + k the velocity after bounce k. All arithmetic is of integers.

The class of a sequence is the unordered pair of its digits' classes, such as 3+7, where their labels are beside the images.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vaescale.config import Size
from vaescale.data.making.items import Clip, Item
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.idx import idx
from vaescale.errors import DataError, UserError

DIGITS = 2
FRAMES, SIZE, COUNT = 20, 64, 10_000
VAL_SHARE = 10  # one held-out sequence for so many of train
SPLITS = {"train": "train", "val": "test"}  # of the sequences, and of the digits
LEAST_SIZE = 16
_STREAMS = {"train": 0, "val": 1}
_KEY = (0x4D4E4953, 0x54)

Integers = NDArray[np.int64]


class Motion(NamedTuple):
    """How digits move. room: the largest coordinate of a digit's upper left corner; speed: the largest one, both in pixels."""

    frames: int
    room: int
    speed: int
    deterministic: bool = False


class Paths(NamedTuple):
    """The paths of a sequence's digits: the number of each among `digits` [2]; its corner in each frame, (y, x), [2, T, 2]."""

    digits: Integers
    corners: Integers


class Digits(NamedTuple):
    """The digits of a split: images [n, s, s]; their classes [n] (-1: none), and the number of classes."""

    images: NDArray[np.uint8]
    labels: Integers
    classes: int

    def pair(self, first: int, second: int) -> int:
        """The number of the pair of two digits' classes, among the pairs (a, b) of a <= b in order; -1 where one has no class."""
        low, high = sorted((int(self.labels[first]), int(self.labels[second])))
        return -1 if low < 0 else low * self.classes - low * (low - 1) // 2 + high - low


def moving_mnist(
    path: Path,
    *,
    frames: int | None = None,
    size: Size | None = None,
    count: int | None = None,
    deterministic: bool = False,
) -> Source:
    """Sequences of two digits of an idx folder: `count` of its train images for train, a tenth as many of its test images for val.

    Digits have half the side of a frame, and move by up to a sixteenth of it per frame along each axis. Sequences have classes where the
    images have labels. Raises UserError for frames that are no squares, and DataError for a folder without train or test.
    """
    size = SIZE if size is None else size
    if not isinstance(size, int) or size < LEAST_SIZE:
        raise UserError(f"--size (={size}) of moving-mnist must be one number, {LEAST_SIZE} at least")
    splits = idx(path, kind="moving-mnist").splits
    if missing := [name for name in SPLITS.values() if name not in splits]:
        raise DataError(f"{path} holds no {missing[0]} images; put their idx files beside the others")
    motion = Motion(frames or FRAMES, size - size // 2, size // 16, deterministic)
    train = count or COUNT
    numbers = {"train": train, "val": max(1, train // VAL_SHARE)}

    listed = cache(lambda name: splits[name]())

    @cache
    def digits(name: str) -> Digits:
        items = list(listed(name).items)
        images = [_resized(item.content, size // 2) for item in items]  # type: ignore[arg-type]
        labels = np.array([item.label for item in items])
        return Digits(np.stack(images), labels, len(listed(name).class_names))

    def split(name: str) -> Split:
        def items() -> Iterator[Item]:
            drawn = digits(SPLITS[name])
            for number in range(numbers[name]):
                paths = draw(name, number, len(drawn.images), motion)
                clip = Clip(tuple(rendered(drawn.images, paths, size)))
                yield Item(f"{number:06d}", clip, drawn.pair(*paths.digits))

        def outline() -> Iterator[Item]:
            drawn = digits(SPLITS[name])
            blank = Clip((np.broadcast_to(np.uint8(0), (size, size, 1)),) * motion.frames)
            for number in range(numbers[name]):
                paths = draw(name, number, len(drawn.images), motion._replace(frames=1))
                yield Item(f"{number:06d}", blank, drawn.pair(*paths.digits))

        names = listed(SPLITS[name]).class_names
        pairs = tuple("+".join(pair) for pair in combinations_with_replacement(names, DIGITS))
        return Split(items(), numbers[name], pairs, outline=outline)

    return Source({name: partial(split, name) for name in SPLITS}, holds="sequences")


def draw(split: str, number: int, digits: int, motion: Motion) -> Paths:
    """The paths of sequence `number` of a split, of `digits` digits to choose from."""
    from vaescale.noise import philox  # late: it imports torch, and not every user of the sources draws

    events, digit = np.arange(motion.frames + 2)[None], np.arange(DIGITS)[:, None]
    counter = (events, np.full_like(events, number), digit, np.full_like(events, _STREAMS[split]))
    words = np.stack(np.broadcast_arrays(*philox(counter, _KEY)))  # [4, DIGITS, events]
    corners = np.stack([path_of(words[:, one], motion) for one in range(DIGITS)])
    return Paths(_below(words[0, :, 0], digits), corners)


def path_of(words: Integers, motion: Motion) -> Integers:
    """The corner (y, x) of a digit in each frame, [T, 2], from four uint32 words for each event, [4, events]."""
    room, top = motion.room, motion.speed
    corner = _below(words[1:3, 0], room + 1)
    velocity = _below(words[:2, 1], 2 * top + 1) - top
    corners, event = [corner], 1
    for _ in range(motion.frames - 1):
        corner = corner + velocity
        below, above = corner < 0, corner > room
        if motion.deterministic:
            corner = np.where(below, -corner, np.where(above, 2 * room - corner, corner))
            velocity = np.where(below | above, -velocity, velocity)
        elif (below | above).any():
            event += 1
            corner = corner.clip(0, room)
            free = _below(words[:2, event], 2 * top + 1) - top
            inward = _below(words[2:, event], top) + 1
            velocity = np.where(below, inward, np.where(above, -inward, free))
        corners.append(corner)
    return np.stack(corners)


def rendered(digits: NDArray[np.uint8], paths: Paths, size: int) -> NDArray[np.uint8]:
    """The frames [T, S, S, 1] of a sequence. digits: [n, s, s]."""
    side = digits.shape[1]
    frames = np.zeros((paths.corners.shape[1], size, size, 1), np.uint8)
    for digit, corners in zip(digits[paths.digits], paths.corners.tolist(), strict=True):
        for frame, (y, x) in zip(frames, corners, strict=True):
            part = frame[y : y + side, x : x + side, 0]
            part += np.minimum(digit, 255 - part)
    return frames


def _below(words: Integers, bound: int) -> Integers:
    """Integers from 0 to bound - 1 of uint32 words."""
    return words * bound >> 32


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image[:, :, 0]).resize((side, side), Image.Resampling.BILINEAR))
