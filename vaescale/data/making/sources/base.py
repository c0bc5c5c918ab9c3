"""A source of images: its splits, each listed when it is called.

A listed image is small (a path, a range of a tar, bytes or an array); the process that writes it reads it.
"""

import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Clip, Item
from vaescale.data.making.sources.forward import Streamed
from vaescale.data.making.table import NOTHING
from vaescale.errors import DataError
from vaescale.system.console import say

# As data sets name their splits, in any case.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "images_background": "train",
    "images_evaluation": "test",  # Omniglot's
}
HELD_OUT = 0.05  # of train, where it is the only split
FEW = 1000  # images of a stream that are held in memory to hold some out
NAMED = 5  # classes that a sentence names


class Split(NamedTuple):
    """A split of a source. number: of its images, None where it is known only after reading.

    outline: lists the same items without reading their images, which have the right shape and no content; None where `items`
    itself reads none. All splits of a source have the same `class_names`: a class has one number in all of them, whether a split
    has images of it or not. left_out: numbers of files that are no images, by ending.
    """

    items: Iterable[Item]
    number: int | None
    class_names: tuple[str, ...] = ()
    left_out: Mapping[str, int] = NOTHING
    outline: Callable[[], Iterable[Item]] | None = None


class Source(NamedTuple):
    """A source's splits, each listed when it is called, and how its images are usually cut to size.

    held_out: the fraction of `train` that became `val`, 0 if none did. complete: nothing is held out. holds: what its items are.
    """

    splits: Mapping[str, Callable[[], Split]]
    crop: Crop = "square"
    resample: Filter = "bicubic"
    channels: int | None = None
    complete: bool = False
    held_out: float = 0
    holds: Literal["images", "sequences"] = "images"


def with_val(source: Source, holdout: float | None) -> Source:
    """The source with a split `val`, cut from `train` where it has none of its own.

    holdout: the fraction of train; None: HELD_OUT where train is the only split, otherwise nothing.
    """
    if "val" in source.splits or "train" not in source.splits or source.complete:
        return source
    if holdout is None:
        holdout = HELD_OUT if len(source.splits) == 1 else 0
    if not holdout:
        return source
    whole = source.splits["train"]
    parts = {name: partial(_held_out, whole, holdout, name == "val") for name in ("train", "val")}
    return source._replace(splits={**source.splits, **parts}, held_out=holdout)


def _held_out(whole: Callable[[], Split], fraction: float, held: bool) -> Split:
    """The part of the items whose key's hash falls below the fraction, or the other items. At least one item is held out."""
    split = whole()
    below = fraction * 2**32
    if isinstance(split.items, Streamed):
        listed = split._replace(items=split.items.listed)
        part = _held_out(lambda: listed, fraction, held)
        return part._replace(items=Streamed(part.items, split.items.opened))  # type: ignore[arg-type]
    if split.outline is not None:
        return _outlined(split, split.outline, below, held)
    if split.number is not None and split.number <= FEW:  # a stream of which the hash might hold out none
        split = split._replace(items=list(split.items))
    if not isinstance(split.items, list):
        return split._replace(
            items=(item for item in split.items if (_hash(item) < below) == held), number=None
        )
    below = max(below, _lowest(split.items))
    items = [item for item in split.items if (_hash(item) < below) == held]
    return split._replace(items=items, number=len(items))


def _lowest(items: Iterable[Item]) -> int:
    """The bound below which the hash of one of the items is. Raises DataError for fewer than two items: train would have none."""
    hashes = sorted(set(map(_hash, items)))
    if len(hashes) < 2:
        few = "one image, too few" if hashes else "no image"
        remedy = "; --holdout 0 writes it to train" if hashes else ""
        raise DataError(f"the source gives {few} to hold some out for val{remedy}")
    return hashes[0] + 1


def _outlined(split: Split, outline: Callable[[], Iterable[Item]], below: float, held: bool) -> Split:
    """The part of a split whose keys are known before its images are read."""
    below = max(below, _lowest(outline()))

    def part(items: Iterable[Item]) -> Iterator[Item]:
        return (item for item in items if (_hash(item) < below) == held)

    def parts() -> Iterator[Item]:
        return part(outline())

    return split._replace(items=part(split.items), number=sum(1 for _ in parts()), outline=parts)


def split_of(name: str) -> str | None:
    """The split (train, val or test) that a usual name stands for, in any case; None for other names."""
    return SPLIT_NAMES.get(name.lower())


def report_absent(split: str, class_names: Sequence[str], present: Container[str]) -> None:
    """Say which classes have no image in a split. present: the names of those that have."""
    if absent := [name for name in class_names if name not in present]:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        what = (
            "classes"
            if len(absent) == len(class_names)
            else f"image of {len(absent)} of {len(class_names)} classes"
        )
        say(f"{split} has no {what} ({', '.join(absent[:NAMED])}{more})")


def _hash(item: Item) -> int:
    """The number that decides about an item: one for all windows of a clip, which look alike."""
    whole = item.content.whole if isinstance(item.content, Clip) else ""
    return zlib.crc32((whole or item.key).encode(errors="surrogateescape"))
