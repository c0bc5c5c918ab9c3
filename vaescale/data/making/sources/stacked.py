"""`stacked:PATH`: three images of the MNIST family as the colour channels of one. Stacked MNIST: Metz et al. 2017, section 3.3.1.

With ten classes, an image has one of 1,000 combinations of them, its mode: what is sampled from a model shows which modes it has.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.idx import idx
from vaescale.errors import DataError

CHANNELS = 3
SEED = 0


def stacked(path: Path) -> Source:
    """The splits of an idx folder, each with as many images as it has there, of three channels that are drawn from it.

    Image n has the channels that a generator of (SEED, n) draws, so it depends on the folder, the split and n alone. Its class is the
    combination of the channels' classes, the first channel's first: 731 has a 7, a 3 and a 1. Raises DataError without labels.
    """
    opened = idx(path, kind="stacked")
    return Source({name: partial(_split, path, name, listed) for name, listed in opened.splits.items()})


def _split(path: Path, name: str, listed: Callable[[], Split]) -> Split:
    single = listed()
    items, classes = list(single.items), len(single.class_names)
    if any(item.label < 0 for item in items):
        raise DataError(f"{path} has no labels of {name}; put the labels' idx file beside the images'")
    weights = classes ** np.arange(CHANNELS)[::-1]

    def stack(number: int) -> Item:
        drawn = np.random.Generator(np.random.Philox(key=[SEED, number])).integers(len(items), size=CHANNELS)
        channels = [items[place] for place in drawn]
        image = np.concatenate([item.content for item in channels], axis=2)
        return Item(f"{number:06d}", image, int(weights @ [item.label for item in channels]))

    names = tuple("".join(parts) for parts in _combinations(single.class_names))
    return Split([stack(number) for number in range(len(items))], len(items), names)


def _combinations(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [(a, b, c) for a in names for b in names for c in names]
