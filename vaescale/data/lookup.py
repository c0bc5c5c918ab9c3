"""Images by their numbers: some at equal distances, the first that can be used, and those with given numbers."""

import numpy as np
import torch
from torch import Tensor

from vaescale.data.batch import Fetched, Request
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError

MOST_LOOKED_AT = 1024  # samples, for a few to show


def evenly(count: int, most: int) -> Tensor:
    """Numbers below `count` at equal distances, at most `most` of them, int64."""
    return torch.arange(min(count, most)) * count // min(count, most)


def images_at(reader: ShardReader, numbers: Tensor) -> Tensor:
    """The images with these numbers, uint8 [B, C, H, W]. Raises DataError when one cannot be used."""
    return usable_at(reader, numbers).images


def usable_at(reader: ShardReader, numbers: Tensor) -> Fetched:
    """The samples with these numbers (int64 [B]). Raises DataError when one cannot be used.

    A metric of the remaining images alone would be another number under the same name.
    """
    fetched = reader.__getitems__(Request(np.asarray(numbers), refill=False))
    if not bool(fetched.usable.all()):
        raise DataError(
            f"{fetched.faults[0].words}; write the shards again; `vaescale verify-shards DIR --deep` names all faults"
        )
    return fetched


def first_usable(reader: ShardReader, count: int) -> Tensor:
    """The numbers of the first `count` samples that can be used, int64 [B]: fewer, or none, where the first MOST_LOOKED_AT hold no more."""
    found: list[int] = []
    for start in range(0, min(len(reader), MOST_LOOKED_AT), 2 * count):
        numbers = np.arange(start, min(start + 2 * count, len(reader), MOST_LOOKED_AT))
        usable = reader.__getitems__(Request(numbers, refill=False)).usable.numpy()
        found += numbers[usable].tolist()
        if len(found) >= count:
            break
    return torch.tensor(found[:count], dtype=torch.int64)
