"""Cost of the data order, without data: opening an index, one step of one rank, resuming at a random step; of a mixture of two sets too.

    python tools/bench/plan.py                 ImageNet's size, then 1e9 samples in 100,000 shards, for 4,096 ranks

Each data set is simulated by an index of its true size, and measured in its own process so that memory is separate.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vaescale.data.index import INDEX, Shard, ShardIndex, ShardTable, index_content, parse_index
from vaescale.data.mixed_plan import MixedPlan, Part
from vaescale.data.plan import Plan, rank_slots

SETS = {"imagenet": (1_281_167, 1282), "1e9": (1_000_000_000, 100_000)}
RANKS, GLOBAL_BATCH, REPEATS = 4096, 65_536, 200


def simulate(samples: int, shards: int, folder: Path) -> None:
    """Write the index of a simulated data set, with uneven shards as in real ones."""
    edges = np.sort(np.random.default_rng(0).choice(samples - 1, shards - 1, replace=False) + 1)
    counts = np.diff(np.concatenate([[0], edges, [samples]])).tolist()
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(shards)]
    rows = (
        Shard(f"shard-{number:06d}.tar", 12_000 * count, digest, count, 30 * count, digest[::-1])
        for number, (count, digest) in enumerate(zip(counts, digests, strict=True))
    )
    index = ShardIndex(str(folder), ShardTable.of(rows), (64, 64, 3), (), {})
    (folder / INDEX).write_bytes(index_content(index))


def measure(folder: Path) -> dict[str, float]:
    """Measure seconds and bytes in this process."""
    gc.collect()
    before = resident_bytes()
    start = time.perf_counter()
    index = parse_index((folder / INDEX).read_bytes(), str(folder))
    plan = Plan(index.shards.samples, GLOBAL_BATCH, 0)
    plan.hash, plan.steps_per_epoch  # noqa: B018
    open_seconds = time.perf_counter() - start
    slots = rank_slots(GLOBAL_BATCH, rank=1234, world_size=RANKS, accumulation=1)[0]
    first = seconds(lambda: plan.samples(0, slots), 1)
    steps = iter(range(1, 10_000))
    step = seconds(lambda: plan.samples(next(steps) % plan.steps_per_epoch, slots), REPEATS)
    places = iter(np.random.default_rng(1).integers(0, 100 * plan.steps_per_epoch, REPEATS).tolist())
    resume = seconds(lambda: plan.samples(next(places), slots), REPEATS)
    whole = iter(range(1, 10_000))
    every_slot = seconds(lambda: plan.samples(next(whole) % plan.steps_per_epoch), 3)
    peak = peak_bytes() - before
    mixed = MixedPlan(tuple(Part(index.shards.samples, weight) for weight in (3.0, 1.0)), GLOBAL_BATCH, 0)
    mixed.hash  # noqa: B018
    mixed.samples(0, slots)
    of_mixture = iter(range(1, 10_000))
    mixed_step = seconds(lambda: mixed.samples(next(of_mixture), slots), REPEATS)
    mixed_places = iter(np.random.default_rng(1).integers(0, 100 * mixed.steps_per_epoch, REPEATS).tolist())
    mixed_resume = seconds(lambda: mixed.samples(next(mixed_places), slots), 10)
    return {
        "samples": plan.num_samples,
        "shards": len(index.shards),
        "open_seconds": open_seconds,
        "peak_bytes": peak,
        "first_step_seconds": first,
        "step_seconds": step,
        "resume_seconds": resume,
        "all_ranks_step_seconds": every_slot,
        "mixed_step_seconds": mixed_step,
        "mixed_resume_seconds": mixed_resume,
    }


def seconds(call, repeats: int) -> float:  # type: ignore[no-untyped-def]
    """Measure the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure each set in a process of its own and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure)))
        return
    sys.stdout.write(
        f"one rank of {RANKS:,}, global batch {GLOBAL_BATCH:,} ({GLOBAL_BATCH // RANKS} slots a rank)\n"
    )
    for name, (samples, shards) in SETS.items():
        with TemporaryDirectory() as folder:
            simulate(samples, shards, Path(folder))
            command = [sys.executable, __file__, "--measure", folder]
            result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        sys.stdout.write(
            f"{name}: {result['samples']:,} samples in {result['shards']:,} shards\n"
            f"  open index and plan     {result['open_seconds'] * 1e3:8.1f} ms, {result['peak_bytes'] / 1e6:.0f} MB at most\n"
            f"  an epoch's first step   {result['first_step_seconds'] * 1e3:8.2f} ms\n"
            f"  a step of one rank      {result['step_seconds'] * 1e3:8.3f} ms\n"
            f"  resume at any step      {result['resume_seconds'] * 1e3:8.2f} ms\n"
            f"  a step of all ranks     {result['all_ranks_step_seconds'] * 1e3:8.1f} ms\n"
            f"  a step of a mixture     {result['mixed_step_seconds'] * 1e3:8.3f} ms (one rank, the set twice, 3 to 1)\n"
            f"  resume of a mixture     {result['mixed_resume_seconds'] * 1e3:8.2f} ms\n"
        )


if __name__ == "__main__":
    main()
