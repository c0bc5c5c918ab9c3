"""A source from outside the package: 8x8 ramps of grey, of two classes."""

from functools import partial

import numpy as np

from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split


def ramps() -> Source:
    """train and val: ramps to the right and downwards, with some noise."""

    def split(count: int, seed: int) -> Split:
        random = np.random.default_rng(seed)
        ramp = np.linspace(0, 200, 8)
        images = np.stack([np.tile(ramp, (8, 1)), np.tile(ramp[:, None], (1, 8))])
        items = [
            Item(
                f"{i:04d}",
                (images[i % 2] + random.integers(0, 50, (8, 8))).astype(np.uint8)[..., None],
                i % 2,
            )
            for i in range(count)
        ]
        return Split(items, count, ("right", "down"))

    return Source({"train": partial(split, 256, 0), "val": partial(split, 64, 1)})
