"""What the reader is asked for and what it gives."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Fault(NamedTuple):
    """A sample that could not be used: its number, a reason of pictures.REASONS, and a sentence."""

    number: int
    reason: str
    words: str


class Batch(NamedTuple):
    """images uint8 [B, C, H, W]; labels int64 [B] (-1: none); slots int64 [B]; mask bool [B], false for padding.

    In training the slots count within the global batch, in evaluation they are the samples' own numbers. keys: the
    images' names. faults: the samples that belonged here and could not be used.
    """

    images: Tensor
    labels: Tensor
    slots: Tensor
    mask: Tensor
    keys: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()


class Request(NamedTuple):
    """Which samples are wanted, int64 [B]; which of them mirrored, bool [B]; whether faults are refilled."""

    numbers: NDArray[np.int64]
    flips: NDArray[np.bool_] | None = None
    refill: bool = True


class Fetched(NamedTuple):
    """images uint8 [B, C, H, W], labels int64 [B], usable bool [B], keys, faults."""

    images: Tensor
    labels: Tensor
    usable: Tensor
    keys: tuple[str, ...]
    faults: tuple[Fault, ...]
