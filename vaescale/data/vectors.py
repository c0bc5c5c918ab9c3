"""The vectors of a set's images, counted before a model that gets them is trained, and their moments."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale import comm
from vaescale.data.config import VectorMember
from vaescale.data.reader import ShardReader
from vaescale.data.vector_members import MISSING
from vaescale.errors import DataError
from vaescale.system.console import say

Floats = NDArray[np.float64]


class Moments(NamedTuple):
    """The mean and the standard deviation of each value over the images that have a vector, float64 [V]."""

    mean: Floats
    deviation: Floats


class _Counted(NamedTuple):
    """Of a shard: faults by kind and what was found instead, the number of vectors, their sum and the sum of their squares."""

    faults: Counter[tuple[str, str]]
    number: int
    total: Floats
    squares: Floats


def refuse_other_vectors(reader: ShardReader, wanted: VectorMember, *, may_miss: bool = False) -> Moments:
    """Raise DataError unless each image of a set has a vector of the wanted size, with finite values; returns their moments.

    may_miss: images without the member are no fault. Each rank reads its share of the shards; the sums are in the order of the
    shards, so that all numbers of ranks have the same moments. All ranks call it.
    """
    of_set = [(one, shard) for one in reader.sets for shard in range(len(one.index.shards))]
    share = range(comm.rank(), len(of_set), comm.world_size())
    counted = comm.together(lambda: {n: _count(*of_set[n], wanted) for n in share})
    every: dict[int, _Counted] = {}
    for some in comm.gather_object(counted):
        every |= some
    for one in reader.sets:
        faults = Counter[tuple[str, str]]()
        for n, (owner, _) in enumerate(of_set):
            if owner is one:
                faults.update(every[n].faults)
        missing = sum(count for (kind, _), count in faults.items() if kind == MISSING)
        if may_miss:
            if missing and comm.is_main():
                say(
                    f"{missing} of {len(one)} images of {one.index.place} have no vector; the model is told none for them"
                )
            faults = Counter({fault: count for fault, count in faults.items() if fault[0] != MISSING})
        if faults:
            raise comm.known_to_all(DataError(_sentence(one, wanted, faults)))
    number = sum(every[n].number for n in range(len(of_set)))
    total = sum((every[n].total for n in range(len(of_set))), np.zeros(wanted.size))
    squares = sum((every[n].squares for n in range(len(of_set))), np.zeros(wanted.size))
    mean = total / max(1, number)
    return Moments(mean, np.sqrt(np.maximum(squares / max(1, number) - mean**2, 0)))


def _count(reader: ShardReader, shard: int, wanted: VectorMember) -> _Counted:
    found = reader.read_vectors(shard, wanted)
    known = found.values[~np.isnan(found.values).any(1)].astype(np.float64)
    return _Counted(found.faults, len(known), known.sum(0), (known**2).sum(0))


def _sentence(reader: ShardReader, wanted: VectorMember, faults: Counter[tuple[str, str]]) -> str:
    kinds = Counter[str]()
    for (kind, _), count in faults.items():
        kinds[kind] += count
    example = {kind: detail for (kind, detail), _ in reversed(faults.most_common())}
    counts = "; ".join(f"{count} {kind} ({example[kind]})" for kind, count in kinds.most_common())
    remedy = (
        "name another member in condition.member, or write the vectors with `vaescale make-shards ... --vectors TABLE`"
        if MISSING in kinds
        else "mend them, or set condition.size to the number of values"
    )
    return (
        f"condition.member (={wanted.name}) must give {wanted.size} finite values for each of the {len(reader)} images of "
        f"{reader.index.place}: {counts}; {remedy}"
    )
