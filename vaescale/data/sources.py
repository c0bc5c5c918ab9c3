"""Where images come from: each source yields samples to be written as shards."""

from collections.abc import Iterator

import numpy as np

from vaescale.data.shards import Sample
from vaescale.errors import UserError


def digits(split: str) -> Iterator[Sample]:
    """Scikit-learn's 1,797 scanned handwritten digits, 8x8 with 17 grey levels, as 8-bit images.

    split: `train` (1,437) or `val` (360), stratified by digit, always the same. Alpaydin & Kaynak 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    ids = dict(
        zip(
            ("train", "val"),
            train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=bunch.target),
            strict=True,
        )
    )
    for i in sorted(ids[split]):
        image = np.rint(bunch.images[i] * (255 / 16)).astype(np.uint8)
        yield Sample(f"{i:06d}", image[:, :, None], int(bunch.target[i]))


# name -> (splits, function of the split)
SOURCES = {"digits": (("train", "val"), digits)}


def open_source(name: str, split: str) -> Iterator[Sample]:
    """The samples of one split of a named source. Raises UserError with the names that exist."""
    if name not in SOURCES:
        raise UserError(f"source {name!r} is unknown; known sources: {', '.join(SOURCES)}")
    return SOURCES[name][1](split)
