"""A fresh order of a set's samples for each pass over it: its shards at random, cut into blocks that are shuffled.

The order depends on (seed, pass, number of the set) alone. A pass is one long line of samples: the shards in a fresh random
order, cut into blocks of whole shards, each block's samples shuffled among themselves. A set of up to one block is shuffled
perfectly.
"""

from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
BLOCK_SAMPLES = 1 << 16
MOST_LANES = 16
KEPT_BYTES = 1 << 25


class _Line(NamedTuple):
    """A pass's shards in their order: where each starts in the line, its first sample, where each block starts."""

    starts: Integers  # [shards]
    first_samples: Integers  # [shards]
    block_starts: Integers  # [blocks + 1], the last one is the end


class Order:
    """The samples of shards in a fresh order for each pass.

    shard_samples: int64 [shards], each at least 1. A block consists of whole shards, about `block_samples` samples. number: of the
    set, in a mixture of several. Time: O(shards) at a pass's first use, O(block) where a block is used first, O(positions) else.
    """

    def __init__(self, shard_samples: Integers, *, seed: int, block_samples: int, number: int = 0) -> None:
        self.shard_samples, self.size = shard_samples, int(shard_samples.sum())
        self._seed, self._block_samples, self._number = seed, block_samples, number
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self.kept: OrderedDict[tuple[int, int], NDArray[np.int32]] = OrderedDict()
        self._lock = Lock()  # the prefetching thread calls `at` too

    def at(self, turn: int, positions: Integers) -> Integers:
        """The samples, counted from 0, at positions of the line of pass number `turn`."""
        line = self._line(turn)
        blocks = np.searchsorted(line.block_starts, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for block in np.unique(blocks):
            start, stop = line.block_starts[block : block + 2]
            in_block = blocks == block
            order = self._block_order(turn, int(block), int(stop - start))
            shuffled[in_block] = start + order[positions[in_block] - start]
        shards = np.searchsorted(line.starts, shuffled, side="right") - 1
        return line.first_samples[shards] + shuffled - line.starts[shards]

    def _line(self, turn: int) -> _Line:
        with self._lock:
            line = self._lines.pop(turn, None)
            if line is None:
                counts = self.shard_samples
                order = self._generator(turn, 0).permutation(len(counts))
                starts = np.cumsum(counts[order]) - counts[order]
                # A block begins with the first shard that starts past a multiple of block_samples.
                begins = np.diff(starts // self._block_samples, prepend=-1) > 0
                line = _Line(
                    starts, (np.cumsum(counts) - counts)[order], np.append(starts[begins], counts.sum())
                )
                if len(self._lines) > 1:
                    self._lines.popitem(last=False)
            self._lines[turn] = line
            return line

    def _block_order(self, turn: int, block: int, size: int) -> NDArray[np.int32]:
        """A block's permutation, from a cache or computed.

        The cache holds those of this pass and its neighbours: as many as there are lanes, or more if they are small.
        """
        key = (turn, block)
        with self._lock:
            order = self.kept.pop(key, None)
            if order is None:
                order = self._generator(turn, block + 1).permutation(size).astype(np.int32)
                for old in [old for old in self.kept if abs(old[0] - turn) > 1]:
                    del self.kept[old]
                while len(self.kept) > MOST_LANES and sum(o.nbytes for o in self.kept.values()) > KEPT_BYTES:
                    self.kept.popitem(last=False)
            self.kept[key] = order
            return order

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process needs: nothing that it can compute again."""
        return _again, (self.shard_samples, self._seed, self._block_samples, self._number)

    def _generator(self, turn: int, purpose: int) -> np.random.Generator:
        counter = [0, 0, self._number, purpose]
        return np.random.Generator(np.random.Philox(key=[self._seed, turn], counter=counter))


def _again(shard_samples: Integers, seed: int, block_samples: int, number: int) -> Order:
    return Order(shard_samples, seed=seed, block_samples=block_samples, number=number)
