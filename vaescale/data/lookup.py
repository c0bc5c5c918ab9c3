"""Images by their numbers: some at equal distances, and those with given numbers."""

import numpy as np
import torch
from torch import Tensor

from vaescale.data.batch import Fetched, Request
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError


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
