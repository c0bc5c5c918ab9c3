"""Which sample fills slot i of step s: a pure function of (data set size, seed, global batch).

Nothing here knows of ranks' history, workers or files. Rank r of N owns an equal, contiguous part of the slots, so
the global batches are the same at every world size, and the loader's whole state is the global step.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import DataError, UserError


@dataclass(frozen=True)
class Plan:
    """The order of a training run. Every epoch is a fresh permutation; its last partial batch is dropped."""

    num_samples: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise DataError(
                f"data.global_batch (={self.global_batch}) exceeds the {self.num_samples} training samples; lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return self.num_samples // self.global_batch

    def samples(self, step: int) -> NDArray[np.int64]:
        """Sample numbers int64 [global_batch] of an optimizer step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_samples, self.seed, epoch)
        return order[place * self.global_batch : (place + 1) * self.global_batch]

    @property
    def hash(self) -> str:
        """Identifies the order: two runs with one hash see the same samples in the same slots."""
        return hashlib.sha256(
            f"permutation-1 {self.num_samples} {self.global_batch} {self.seed}".encode()
        ).hexdigest()


def rank_slots(
    global_batch: int, *, rank: int, world_size: int, accumulation: int
) -> list[NDArray[np.int64]]:
    """The slots of each of a rank's micro-batches in one step: `accumulation` arrays of equal size.

    Micro-batch m is a fixed part of the global batch and the ranks share it, so that what it contains does not
    depend on their number. With one micro-batch, rank r of N owns slots [r*B/N, (r+1)*B/N).
    Raises UserError when the global batch cannot be shared equally.
    """
    parts = world_size * accumulation
    if global_batch % parts:
        nearest = max(1, round(global_batch / parts)) * parts
        raise UserError(
            f"data.global_batch (={global_batch}) cannot be shared equally by {world_size} processes x "
            f"training.accumulation {accumulation}; use {nearest}"
        )
    slots = np.arange(global_batch).reshape(accumulation, world_size, -1)
    return list(slots[:, rank])


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)
