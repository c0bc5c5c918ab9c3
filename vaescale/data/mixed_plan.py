"""Which sample fills slot i of step s where several sets are mixed by weight, or classes balanced: a pure function, as `plan.py`.

Slot i of step s is position p = s B + i of the run. `shares.py` says which strand takes p, and how many earlier positions it has
taken. A strand is a set, or a class of one; it is read to its end without repetition, pass after pass, each in a fresh order.
Every prefix of a run, and so every batch and every rank's part of it, has the shares to a few samples. An epoch is as many
samples as all sets hold together, whatever their weights: a set is then read `passes` times in an epoch.

A batch takes the next samples of 16 places of a strand's line in turn, so all ranks read at all of these places.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vaescale.data.order import BLOCK_SAMPLES, MOST_LANES, Integers, Order
from vaescale.data.plan import Epochs
from vaescale.data.shares import Shares


class Members(NamedTuple):
    """A class of a set: its number, its weight among the set's classes, and its samples' numbers in the set, ascending."""

    label: int
    weight: float
    numbers: Integers


class Part(NamedTuple):
    """A set of a mixture: samples per shard (int64, each at least 1), weight, and its classes where these are balanced."""

    shard_samples: Integers
    weight: float
    classes: Sequence[Members] = ()

    @property
    def size(self) -> int:
        """The number of samples."""
        return int(self.shard_samples.sum())


class _Strand(NamedTuple):
    """Samples that are read to their end in an order: all of a set that begins at number `first`, or some of its numbers."""

    first: int
    order: Order
    numbers: Integers | None


@dataclass(frozen=True, eq=False)
class MixedPlan(Epochs):
    """The order of a training run over several sets, whose samples are numbered through: those of the first set, then the next.

    parts: of positive weight. The members are those of `Plan`. Time: O(slots log strands) at most steps; O(shards) or O(block)
    where a strand begins a pass or enters a block.
    """

    parts: tuple[Part, ...]
    global_batch: int
    seed: int
    block_samples: int = BLOCK_SAMPLES

    @cached_property
    def firsts(self) -> Integers:
        """The number of each set's first sample, and the number of all samples, int64 [sets + 1]."""
        return np.cumsum([0, *(part.size for part in self.parts)])

    @property
    def num_samples(self) -> int:
        """The number of samples of all sets together, which is the length of an epoch."""
        return int(self.firsts[-1])

    @cached_property
    def shares(self) -> Shares:
        """The division of positions among strands."""
        weights = [[one.weight for one in part.classes] or [1.0] for part in self.parts]
        return Shares(weights, [part.weight for part in self.parts])

    @cached_property
    def _strands(self) -> list[_Strand]:
        strands = list[_Strand]()
        for first, part in zip(self.firsts.tolist(), self.parts, strict=False):
            numbers: Sequence[Integers | None] = [one.numbers for one in part.classes] or [None]
            for of_class in numbers:
                shards = part.shard_samples if of_class is None else self._blocks(len(of_class))
                order = Order(
                    shards, seed=self.seed, block_samples=self.block_samples, number=len(strands) + 1
                )
                strands.append(_Strand(first, order, of_class))
        return strands

    def _blocks(self, size: int) -> Integers:
        """The samples of a class in blocks, which take the place of shards."""
        whole, rest = divmod(size, self.block_samples)
        return np.array([self.block_samples] * whole + [rest] * (rest > 0), dtype=np.int64)

    @property
    def hash(self) -> str:
        """A hash that identifies the order: two runs with the same hash see the same samples in the same slots."""
        order = f"mixed-1 {self.global_batch} {self.seed} {self.block_samples} {self.shares_hash}"
        return hashlib.sha256(order.encode()).hexdigest()

    @cached_property
    def shares_hash(self) -> str:
        """A hash that identifies how often each sample is drawn: `in_an_epoch` depends on nothing else."""
        digest = hashlib.sha256(self.shares.table())
        for strand in self._strands:
            for table in (strand.order.shard_samples, strand.numbers):
                digest.update(b"" if table is None else table.astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def samples(self, step: int, slots: Integers | None = None) -> Integers:
        """Sample numbers int64 of an optimizer step, counted from 0: of all slots, or of the given ones."""
        slots = np.arange(self.global_batch) if slots is None else slots
        chosen, turns = self.shares.at(step * self.global_batch + slots)
        numbers = np.empty_like(chosen)
        by_strand = np.argsort(chosen, kind="stable")
        strands, starts = np.unique(chosen[by_strand], return_index=True)
        for strand, of_strand in zip(strands.tolist(), np.split(by_strand, starts[1:]), strict=True):
            numbers[of_strand] = _drawn(self._strands[strand], turns[of_strand])
        return numbers

    def in_an_epoch(self, positions: Integers) -> Integers:
        """Sample numbers that have the mixture's shares, for positions below `num_samples`: what training reads, but evenly spread.

        Of c draws from n samples in an epoch, draw j is sample floor(j n / c): each one equally often, to one draw.
        """
        chosen, turns = self.shares.at(positions)
        counts = self.shares.counts(self.num_samples)
        sizes = np.array([strand.order.size for strand in self._strands])
        firsts = np.array([strand.first for strand in self._strands])
        numbers = turns * sizes[chosen] // counts[chosen]
        for number, strand in enumerate(self._strands):
            if strand.numbers is not None and (of_strand := chosen == number).any():
                numbers[of_strand] = strand.numbers[numbers[of_strand]]
        in_all: Integers = firsts[chosen] + numbers
        return in_all

    def passes(self) -> list[float]:
        """How often an epoch reads each set, as a mean over its samples."""
        counts, strand, passes = self.shares.counts(self.num_samples), 0, list[float]()
        for part in self.parts:
            strands = len(part.classes) or 1
            passes.append(float(counts[strand : strand + strands].sum() / part.size))
            strand += strands
        return passes


def _drawn(strand: _Strand, turns: Integers) -> Integers:
    """The samples that a strand gives at its turns, which are counted from 0 over the whole run."""
    size = strand.order.size
    passes, place = np.divmod(turns, size)
    lanes = min(MOST_LANES, size)
    each = size // lanes
    positions = np.where(place < each * lanes, place % lanes * each + place // lanes, place)
    numbers = np.empty_like(turns)
    for turn in np.unique(passes).tolist():
        in_pass = passes == turn
        numbers[in_pass] = strand.order.at(turn, positions[in_pass])
    return strand.first + (numbers if strand.numbers is None else strand.numbers[numbers])
