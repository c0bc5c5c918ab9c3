"""Which of several sets fills position p of a run, by weight: a pure function of the position.

Positions are divided in two again and again, along a binary tree whose leaves are the sets. Of the first p positions of a node
with the integer weights a (left) and t - a (right), the left half takes

    L(p) = floor(p a / t + 1/2)

so position p goes left where L(p + 1) > L(p), as number L(p) of the left half, and otherwise right, as number p - L(p). Each
node is off its exact share by half a sample at most, at every p, and by nothing at each multiple of t. No position depends on
another one, and the time is O(positions log sets).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
LARGEST = 1 << 31  # of a sum of weights: products of two fit into int64


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the ratios of positive weights: exactly, or to 2^-31 of their sum where that has more digits."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    return whole if total <= LARGEST else [max(1, round(Fraction(one * LARGEST, total))) for one in whole]


class Shares:
    """The division of positions among leaves. weights: positive, of each leaf; of two levels, those of each group's leaves.

    group_weights: of the groups, if the leaves are in groups; the leaves are then numbered through all groups.
    """

    def __init__(
        self, weights: Sequence[Sequence[float]], group_weights: Sequence[float] | None = None
    ) -> None:
        self._left: list[int] = []  # weight of a node's left half
        self._total: list[int] = []
        self._children: list[tuple[int, int]] = []  # nodes, or ~leaf
        groups, leaf = list[int](), 0
        for of_group in weights:
            numbers = [~(leaf + number) for number in range(len(of_group))]
            groups.append(self._grow(whole_weights(of_group), numbers))
            leaf += len(of_group)
        self.count = leaf
        self._root = self._grow(whole_weights(group_weights or [1.0]), groups)
        self._tables = (
            np.array(self._left, dtype=np.int64),
            np.array(self._total, dtype=np.int64),
            np.array(self._children, dtype=np.int64).reshape(-1, 2),
        )

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """The leaf of each position, and how many earlier positions have the same leaf, int64."""
        left, total, children = self._tables
        node, place = np.full(positions.shape, self._root, dtype=np.int64), positions.astype(np.int64)
        while len(inner := np.flatnonzero(node >= 0)):
            at, p = node[inner], place[inner]
            before, after = (_taken(q, left[at], total[at]) for q in (p, p + 1))
            goes_left = after > before
            place[inner] = np.where(goes_left, before, p - before)
            node[inner] = np.where(goes_left, children[at, 0], children[at, 1])
        return ~node, place

    def counts(self, positions: int) -> Integers:
        """How many of the first positions each leaf has, int64 [leaves]."""
        counts = np.zeros(self.count, dtype=np.int64)
        open_nodes = [(self._root, positions)]
        while open_nodes:
            node, number = open_nodes.pop()
            if node < 0:
                counts[~node] = number
                continue
            left, total = np.array([self._left[node]]), np.array([self._total[node]])
            taken = int(_taken(np.array([number]), left, total)[0])
            first, second = self._children[node]
            open_nodes += [(first, taken), (second, number - taken)]
        return counts

    def table(self) -> bytes:
        """What identifies the division."""
        return b"".join(part.astype("<i8").tobytes() for part in self._tables)

    def _grow(self, weights: Sequence[int], numbers: Sequence[int]) -> int:
        """Add the tree of these nodes or leaves. Returns its root."""
        if len(numbers) == 1:
            return numbers[0]
        half = len(numbers) // 2
        halves = [(weights[part], numbers[part]) for part in (slice(half), slice(half, None))]
        children = [self._grow(of_half, inside) for of_half, inside in halves]
        self._left.append(sum(weights[:half]))
        self._total.append(sum(weights))
        self._children.append((children[0], children[1]))
        return len(self._total) - 1


def _taken(positions: Integers, left: Integers, total: Integers) -> Integers:
    """L(p): how many of the first p positions of a node its left half has."""
    turns, rest = np.divmod(positions, total)
    return turns * left + (rest * left + total // 2) // total
