"""Which sample fills slot i of step s: a pure function of (samples per shard, seed, global batch).

The plan depends on no history, worker or file. Rank r of N owns an equal, contiguous part of the slots, so the
global batches are the same at every world size, and the loader's whole state is the global step.

An epoch is a pass over all samples in a fresh order (see `order.py`). The global batch is drawn from `lanes` places of its line
at once, at equal distances, so that a batch mixes many blocks while a process touches few shards at a time. Of several sets,
`mixed_plan.py` says the same.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vaescale.data.order import BLOCK_SAMPLES, MOST_LANES, Integers, Order
from vaescale.errors import DataError, UserError


class Epochs:
    """What plans have in common: epochs of whole global batches. Raises DataError for fewer samples than a global batch."""

    global_batch: int

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise DataError(
                f"data.global_batch (={self.global_batch}) exceeds the {self.num_samples} training samples; lower it"
            )

    @property
    def num_samples(self) -> int:
        """The number of samples of an epoch."""
        raise NotImplementedError

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps per epoch."""
        return self.num_samples // self.global_batch

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, counted from 0."""
        return step // self.steps_per_epoch


@dataclass(frozen=True, eq=False)
class Plan(Epochs):
    """The order of a training run. Every epoch is a fresh order; its last partial batch is dropped.

    shard_samples: int64 [shards], each at least 1. A block consists of whole shards, about `block_samples` samples.
    Time: O(shards) at an epoch's first step, O(block) where a lane enters a block, O(slots) at any other.
    """

    shard_samples: Integers
    global_batch: int
    seed: int
    block_samples: int = BLOCK_SAMPLES

    @cached_property
    def order(self) -> Order:
        """The order of the samples in each epoch."""
        return Order(self.shard_samples, seed=self.seed, block_samples=self.block_samples)

    @cached_property
    def num_samples(self) -> int:
        """The number of samples in all shards."""
        return int(self.shard_samples.sum())

    @cached_property
    def lanes(self) -> int:
        """The number of places of an epoch's line from which a batch is drawn: the batch's largest divisor up to 16."""
        return max(lanes for lanes in range(1, MOST_LANES + 1) if self.global_batch % lanes == 0)

    @property
    def hash(self) -> str:
        """A hash that identifies the order: two runs with the same hash see the same samples in the same slots."""
        settings = f"blocks-1 {self.global_batch} {self.seed} {self.block_samples} ".encode()
        return hashlib.sha256(settings + self.shard_samples.astype("<i8").tobytes()).hexdigest()

    def samples(self, step: int, slots: Integers | None = None) -> Integers:
        """Sample numbers int64 of an optimizer step, counted from 0: of all slots, or of the given ones."""
        epoch, within_epoch = divmod(step, self.steps_per_epoch)
        slots = np.arange(self.global_batch) if slots is None else slots
        lane_slots = self.global_batch // self.lanes
        lane, within = np.divmod(slots, lane_slots)
        positions = (lane * self.steps_per_epoch + within_epoch) * lane_slots + within
        return self.order.at(epoch, positions)


def rank_slots(
    global_batch: int, *, rank: int, world_size: int, accumulation: int
) -> list[NDArray[np.int64]]:
    """The slots of each of a rank's micro-batches in one step: `accumulation` arrays of equal size.

    Micro-batch m is a fixed part of the global batch and the ranks share it, so that its content does not
    depend on their number. With one micro-batch, rank r of N owns slots [r*B/N, (r+1)*B/N).
    Raises UserError when the global batch cannot be shared equally.
    """
    shares = world_size * accumulation
    if global_batch % shares:
        nearest = max(1, round(global_batch / shares)) * shares
        raise UserError(
            f"data.global_batch (={global_batch}) cannot be shared equally by {world_size} processes x "
            f"training.accumulation {accumulation}; use {nearest}"
        )
    slots = np.arange(global_batch).reshape(accumulation, world_size, -1)
    return list(slots[:, rank])
