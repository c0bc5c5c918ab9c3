"""Requests to the reader of shards, and the batches that it returns."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vaescale.data.augmentation import Changes


class Fault(NamedTuple):
    """A sample that could not be used. reason: one of pictures.REASONS; words: a sentence."""

    number: int
    reason: str
    words: str


class Batch(NamedTuple):
    """A batch of samples.

    images: [B, C, H, W] in the stored type, moments of latents float32 [B, 2, C, H, W], codes int32 [B, 1, h, w], or sequences uint8 [B, T, C, H, W]; labels: int64 [B] (-1: none); slots: int64 [B]; mask: bool [B], false for padding and unusable
    samples. In training the slots count within the global batch; in evaluation they are the samples' numbers. keys: the images'
    names. faults: the samples of this batch that could not be used. vectors: float32 [B, V], NaN without one, where the recipe's condition
    reads vectors.
    """

    images: Tensor
    labels: Tensor
    slots: Tensor
    mask: Tensor
    keys: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    vectors: Tensor | None = None


class Request(NamedTuple):
    """The numbers of the samples to read, int64 [B]; which to mirror, bool [B]; whether to replace unusable ones; other changes.

    places: of the windows of sequences, float64 [B] in [0, 1); None: the first windows.
    """

    numbers: NDArray[np.int64]
    flips: NDArray[np.bool_] | None = None
    refill: bool = True
    changes: Changes | None = None
    places: NDArray[np.float64] | None = None


class Fetched(NamedTuple):
    """The samples of a request: images as in `Batch`, labels int64 [B], usable bool [B], keys, faults, vectors as in `Batch`."""

    images: Tensor
    labels: Tensor
    usable: Tensor
    keys: tuple[str, ...]
    faults: tuple[Fault, ...]
    vectors: Tensor | None = None
