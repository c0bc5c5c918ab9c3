"""A source of images: its splits, each listed when it is called.

A listed image is small (a path, a range of a tar, bytes or an array); the process that writes it reads it.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, NamedTuple

from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Item

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Split(NamedTuple):
    """A split of a source. number: of its images, None where it is known only after reading."""

    items: Iterable[Item]
    number: int | None
    class_names: tuple[str, ...] = ()


class Source(NamedTuple):
    """A source's splits, each listed when it is called, and how its images are usually cut to size.

    A source without a split `val` has one cut from `train` (`held_out`), unless it is `complete`.
    """

    splits: Mapping[str, Callable[[], Split]]
    crop: Crop = "square"
    resample: Filter = "bicubic"
    channels: Literal[1, 3] | None = None
    complete: bool = False
    held_out: bool = False


def with_val(source: Source, holdout: float) -> Source:
    """The source with a split `val`, cut from `train` where it has none of its own."""
    if "val" in source.splits or "train" not in source.splits or source.complete or not holdout:
        return source
    whole = source.splits["train"]
    parts = {name: partial(_held_out, whole, holdout, name == "val") for name in ("train", "val")}
    return source._replace(splits={**source.splits, **parts}, held_out=True)


def _held_out(whole: Callable[[], Split], fraction: float, held: bool) -> Split:
    """The part of the items whose key's hash falls below the fraction, or the other items. At least one item is held out."""
    split = whole()
    below = fraction * 2**32
    if not isinstance(split.items, list):  # a stream
        return split._replace(
            items=(item for item in split.items if (_hash(item) < below) == held), number=None
        )
    below = max(below, min(map(_hash, split.items)) + 1)
    items = [item for item in split.items if (_hash(item) < below) == held]
    return split._replace(items=items, number=len(items))


def _hash(item: Item) -> int:
    return zlib.crc32(item.key.encode())
