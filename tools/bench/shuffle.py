"""Quality of block shuffling, relative to a true permutation, for a data set written class by class (the worst case).

    python tools/bench/shuffle.py

runs        number of runs of equal class in the order of an epoch, divided by the mean of a true permutation
neighbours  number of pairs within a batch that were written side by side, divided by the mean of a true permutation
classes     number of distinct classes in a batch, divided by the mean of a true permutation
shards      number of shards that one of 8 ranks reads within 100 steps
"""

import sys
from typing import Any

import numpy as np

from vaescale.data.plan import Plan, rank_slots

SHARDS, PER_SHARD, CLASSES, BATCH, STEPS = 1281, 1000, 1000, 256, 2000
BLOCKS = (1, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 21)


def main() -> None:
    """Print the measures for each block size."""
    count = SHARDS * PER_SHARD
    classes = np.arange(count) * CLASSES // count
    truth = statistics(classes, lambda step: np.random.default_rng(step).choice(count, BATCH, replace=False))
    sys.stdout.write(
        f"{count:,} samples of {CLASSES} classes in {SHARDS:,} shards, batch {BATCH}, {STEPS} steps\n"
    )
    sys.stdout.write("     block     runs  neighbours  classes  shards\n")
    for block in BLOCKS:
        plan = Plan(np.full(SHARDS, PER_SHARD), BATCH, 0, block)
        runs, near, distinct = statistics(classes, plan.samples) / truth
        slots = rank_slots(BATCH, rank=0, world_size=8, accumulation=1)[0]
        touched = {int(s) for step in range(100) for s in plan.samples(step, slots) // PER_SHARD}
        sys.stdout.write(f"{block:>10,} {runs:8.3f} {near:11.2f} {distinct:8.3f} {len(touched):7}\n")


def statistics(classes, batch_of) -> Any:  # type: ignore[no-untyped-def]
    """Means over the steps: runs, neighbours and distinct classes of a batch."""
    rows = []
    for step in range(STEPS):
        numbers = batch_of(step)
        labels = classes[numbers]
        runs = 1 + np.count_nonzero(labels[1:] != labels[:-1])
        near = np.count_nonzero(np.diff(np.sort(numbers)) == 1)
        rows.append((int(runs), int(near), len(np.unique(labels))))
    return np.mean(rows, axis=0)


if __name__ == "__main__":
    main()
