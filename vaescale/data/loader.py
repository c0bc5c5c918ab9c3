"""Batches of a rank: the plan selects samples, and the reader reads them, in this process or in workers.

The global batches are the same for any number of ranks and workers. Remote shards are fetched ahead.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import comm, noise
from vaescale.data.augmentation import draw
from vaescale.data.batch import Batch, Fetched, Request
from vaescale.data.config import AugmentConfig, DataConfig
from vaescale.data.index import ShardIndex
from vaescale.data.mixed_plan import MixedPlan
from vaescale.data.order import MOST_LANES
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.prefetch import Ahead
from vaescale.data.reader import ShardReader
from vaescale.data.workers import Workers, refuse_small_shared_memory
from vaescale.errors import DataError

AHEAD_SHARE = 4  # one such part of the cache is for shards that are fetched ahead


def training_batches(
    reader: ShardReader,
    plan: Plan | MixedPlan,
    *,
    steps: range,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
    flip: bool = False,
    augment: AugmentConfig | None = None,
) -> Generator[list[Batch]]:
    """Yield this rank's micro-batches of each optimizer step."""
    for store in reader.remote_stores:
        store.closed = False  # an earlier pass, before a rollback to a checkpoint, closed it
    slots = rank_slots(plan.global_batch, rank=rank, world_size=world_size, accumulation=accumulation)
    if workers and not reader.in_memory:
        batch_bytes = len(slots[0]) * reader.sample_bytes
        refuse_small_shared_memory(workers, batch_bytes, ranks_here=comm.ranks_on_this_node())
    requests = (
        _request(plan, step, micro_slots, flip, augment, reader.has_windows)
        for step in steps
        for micro_slots in slots
    )
    batches = _fetch(reader, requests, workers)
    slot_tensors = [torch.from_numpy(micro_slots) for micro_slots in slots]
    with _ahead(reader, plan, np.concatenate(slots), steps) as ahead:
        for done in steps:
            step = [next(batches) for _ in slots]
            if ahead is not None:
                ahead.reached(done)
            yield [
                # torch's pinning turns tuples into lists
                Batch(
                    fetched.images,
                    fetched.labels,
                    micro_slots,
                    fetched.usable,
                    tuple(fetched.keys),
                    tuple(fetched.faults),
                    fetched.vectors,
                )
                for fetched, micro_slots in zip(step, slot_tensors, strict=True)
            ]
    next(batches, None)  # ends the workers now, not when Python collects its garbage


def evaluation_batches(
    reader: ShardReader,
    *,
    batch: int,
    rank: int,
    world_size: int,
    workers: int | Workers = 0,
    images: int | None = None,
) -> Iterator[Batch]:
    """Yield every sample, or the first `images`, once over all ranks, in order. batch: samples of all ranks together.

    Padding and unusable samples are masked; all ranks get equally many batches. workers: the number of processes that read,
    or those that outlive this pass.
    """
    per_rank, number = max(1, batch // world_size), min(len(reader), images or len(reader))
    starts = range(rank * per_rank, number + rank * per_rank, per_rank * world_size)
    batches = [np.arange(start, start + per_rank) for start in starts]
    requests = (Request(np.minimum(numbers, number - 1), refill=False) for numbers in batches)
    for numbers, fetched in zip(batches, _fetch(reader, requests, workers), strict=True):
        exists = torch.from_numpy(numbers < number)
        faults = {fault.number: fault for fault in fetched.faults if fault.number in numbers}
        yield Batch(
            fetched.images,
            fetched.labels,
            torch.from_numpy(numbers),
            exists & fetched.usable,
            tuple(fetched.keys),
            tuple(faults.values()),
            fetched.vectors,
        )


def shard_batches(
    reader: ShardReader, shards: Iterable[int], *, batch: int, workers: int = 0
) -> Iterator[tuple[int, Batch]]:
    """Yield the samples of some shards in order, in batches of up to `batch` from one shard, each with its shard.

    The slots are the samples' numbers; unusable samples are masked.
    """
    starts = np.concatenate([[0], np.cumsum(reader.index.shards.samples)])
    batches = [
        (shard, np.arange(start, min(start + batch, starts[shard + 1])))
        for shard in shards
        for start in range(int(starts[shard]), int(starts[shard + 1]), batch)
    ]
    requests = (Request(numbers, refill=False) for _, numbers in batches)
    for (shard, numbers), fetched in zip(batches, _fetch(reader, requests, workers), strict=True):
        yield (
            shard,
            Batch(
                fetched.images,
                fetched.labels,
                torch.from_numpy(numbers),
                fetched.usable,
                tuple(fetched.keys),
                tuple(fetched.faults),
                fetched.vectors,
            ),
        )


def working_set_bytes(index: ShardIndex, plan: Plan | MixedPlan, *, ranks_here: int, world_size: int) -> int:
    """The approximate bytes of shards that a node draws from at once: a block for each lane of its ranks.

    Of a mixture, a block for each lane of each set, or all of it where classes are balanced.
    """
    total = index.num_bytes
    block = plan.block_samples * total // plan.num_samples + max(shard.bytes for shard in index.shards)
    if isinstance(plan, MixedPlan):
        balanced = any(part.classes for part in plan.parts)
        return total if balanced else min(total, MOST_LANES * len(plan.parts) * block)
    lanes_here = -(-plan.lanes * ranks_here // world_size)
    return min(total, lanes_here * block)


def refuse_small_cache(reader: ShardReader, plan: Plan | MixedPlan, config: DataConfig) -> None:
    """Raise DataError when the node's cache is smaller than what training draws from at once."""
    if not reader.remote_stores or reader.in_memory:
        return
    needed = working_set_bytes(
        reader.index, plan, ranks_here=comm.ranks_on_this_node(), world_size=comm.world_size()
    )
    everything = sum(shard.bytes + shard.entries_bytes for shard in reader.index.shards)
    needed = min(everything, needed + needed // (AHEAD_SHARE - 1))
    if needed > config.cache_bytes:
        raise DataError(
            f"data.cache_bytes (={config.cache_bytes}) is less than the {needed} bytes of shards that training draws "
            f"from at once; raise it, or lower data.shuffle_block (={plan.block_samples})"
        )


@contextmanager
def _ahead(
    reader: ShardReader, plan: Plan | MixedPlan, slots: NDArray[np.int64], steps: range
) -> Iterator[Ahead | None]:
    """Fetch remote shards ahead of a rank's steps within the block; yields None where there is nothing to fetch."""
    stores, sizes = reader.remote_stores, [shard.bytes for shard in reader.index.shards]
    if not stores or reader.in_memory:
        yield None
        return

    def needed(step: int) -> list[tuple[int, int]]:
        shards = np.unique(reader.shards_of(plan.samples(step, slots)))
        return [(plan.epoch(step), shard) for shard in shards.tolist()]

    needs = ((step, needed(step)) for step in steps)
    limit = stores[0].cache_bytes // AHEAD_SHARE // comm.ranks_on_this_node()
    try:
        with Ahead(needs, reader.fetch_shard, sizes=sizes.__getitem__, limit=limit) as ahead:
            yield ahead
    finally:
        for store in stores:
            store.closed = True


def _fetch(reader: ShardReader, requests: Iterable[Request], workers: int | Workers) -> Iterator[Fetched]:
    """Read the requested batches. workers: the number of processes to start for this pass, or those that outlive it."""
    if isinstance(workers, Workers):
        assert workers.reader is reader
        return workers.fetch(requests)
    return Workers(reader, workers).fetch(requests, last_pass=True)


def _request(
    plan: Plan | MixedPlan,
    step: int,
    slots: NDArray[np.int64],
    flip: bool,
    augment: AugmentConfig | None,
    windows: bool,
) -> Request:
    """windows: whether samples are windows of sequences, whose places are drawn."""
    numbers = plan.samples(step, slots)
    flips = None
    if flip and isinstance(plan, Plan):
        stream = noise.Stream(plan.seed, plan.epoch(step), torch.from_numpy(numbers))
        flips = (noise.uniform(stream, noise.FLIP, (1,))[:, 0] < 0.5).numpy()
    by_slot = noise.Stream(plan.seed, step, torch.from_numpy(slots))
    if flip and flips is None:  # a set may be read more than once in an epoch
        flips = (noise.uniform(by_slot, noise.FLIP, (1,))[:, 0] < 0.5).numpy()
    places = None
    if windows:
        places = noise.uniform(by_slot, noise.WINDOW, (1,))[:, 0].double().numpy()
    return Request(numbers, flips, changes=draw(augment, by_slot) if augment else None, places=places)
