"""Integer probability tables, and the digits into which values are divided so that no table has more than four entries.

A value of 256 levels is four digits of base 4, each coded under its distribution given the digits before it. So a level costs 12
values of the distribution function in place of 257, for all values of many images at once, and the coder reads short tables.

A code is a generator: it yields a table for N symbols and is sent the N symbols, until a value is complete. `coded` and `drawn` run
one; the coder runs it to decode (see `ans.py`).

Legend: N symbols that are coded at once, S entries of a table; masses are whole numbers whose sum is 2^PRECISION.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.compression.arithmetic import Reals

PRECISION = 24  # bits of a mass; a float32 holds such integers exactly
BASE = 4
FLOOR = 2.0**-60  # added to each weight, so that none of a table's totals is 0
Integers = NDArray[np.int64]
Symbols = NDArray[np.int32]
Table = NDArray[np.float32]
"""Masses less one, whole numbers [N, S]: the form that the coder takes, which adds one to each so that every symbol can be coded."""
Code = Generator[Table, Symbols, None]


class Coded(NamedTuple):
    """What a code was given and yielded: symbols [N] and tables [N, S], round by round."""

    symbols: list[Symbols]
    tables: list[Table]

    @property
    def bits(self) -> list[Reals]:
        """The length of each symbol, -log2 of its mass, [N] for each round."""
        return [
            PRECISION - np.log2(np.take_along_axis(table, symbol[:, None], 1)[:, 0].astype(np.float64) + 1)
            for symbol, table in zip(self.symbols, self.tables, strict=True)
        ]

    def bits_of(self, images: int) -> Reals:
        """The length of each image's symbols, [B], where each round has an equal number of symbols for each."""
        total: Reals = np.sum([bits.reshape(images, -1).sum(1) for bits in self.bits], axis=0)
        return total


def table(weights: Sequence[Reals]) -> Table:
    """A table from S weights [N] each, not negative: masses of at least 1 in proportion to them.

    What rounding leaves goes to the largest.
    """
    total = weights[0] + FLOOR
    for weight in weights[1:]:
        total = total + (weight + FLOOR)
    free = float((1 << PRECISION) - len(weights))
    scale = np.divide(free, total)
    masses = np.stack([np.floor((weight + FLOOR) * scale) for weight in weights], axis=1)
    masses = np.minimum(masses, free)
    left = np.full(len(masses), free)
    for column in masses.T:
        left -= column
    masses[np.arange(len(masses)), masses.argmax(1)] += left
    result: Table = masses.astype(np.float32)
    return result


def digits(levels: int) -> int:
    """The number of digits of base 4 of `levels` values, which is a power of 4."""
    count = round(math.log(levels, BASE))
    assert BASE**count == levels, f"{levels} is no power of {BASE}"
    return count


def digits_of(values: Integers, levels: int) -> list[Symbols]:
    """The digits of values [N], the highest first."""
    return [(values // BASE**place % BASE).astype(np.int32) for place in range(digits(levels) - 1, -1, -1)]


def from_digits(symbols: Sequence[Symbols]) -> Integers:
    """The values [N] of digits, the highest first."""
    value = np.zeros(len(symbols[0]), np.int64)
    for symbol in symbols:
        value = value * BASE + symbol
    return value


def by_digits(cdf: Callable[[Integers], Reals], number: int, levels: int) -> Code:
    """The code of `number` values of `levels` levels from their distribution functions.

    cdf: from edges int64 [E, N], 0 to levels, to the probability [E, N] of the values below each edge. It is not called for edges 0
    and `levels`.
    """
    first = np.zeros(number, np.int64)
    low, high = np.zeros(number), np.ones(number)
    width = levels
    rows = np.arange(number)
    while width > 1:
        width //= BASE
        inner = first + width * np.arange(1, BASE)[:, None]
        bounds = np.concatenate([low[None], np.clip(cdf(inner), low, high), high[None]])
        for edge in range(1, BASE):
            np.maximum(bounds[edge], bounds[edge - 1], out=bounds[edge])
        symbols = yield table(list(bounds[1:] - bounds[:-1]))
        low, high = bounds[symbols, rows], bounds[symbols + 1, rows]
        first = first + width * symbols


def looked_up(below: Reals) -> Callable[[Integers], Reals]:
    """A distribution function for `by_digits` from its values [L + 1, N] at all edges."""
    places = np.arange(below.shape[1])
    return lambda edges: below[edges, places]


def symbols_received(code: Code) -> Generator[Table, Symbols, list[Symbols]]:
    """Pass a code on, and return its symbols, round by round, when they are known."""
    symbols = list[Symbols]()
    shown = next(code)
    while True:
        symbols.append((yield shown))
        try:
            shown = code.send(symbols[-1])
        except StopIteration:
            return symbols


def values_received(code: Code) -> Generator[Table, Symbols, Integers]:
    """Pass a code of digits on, and return the values [N] when they are known."""
    return from_digits((yield from symbols_received(code)))


def coded(code: Code, symbols: Sequence[Symbols]) -> Coded:
    """The tables of known symbols, given round by round."""
    tables = [next(code)]
    for one in symbols[:-1]:
        tables.append(code.send(one))
    try:
        code.send(symbols[-1])
    except StopIteration:
        return Coded(list(symbols), tables)
    raise AssertionError("the code has more rounds than symbols")


def received(code: Code, take: Callable[[Table], Symbols]) -> Coded:
    """Run a code on the symbols that `take` returns for each table."""
    symbols, tables = list[Symbols](), [next(code)]
    while True:
        symbols.append(take(tables[-1]))
        try:
            tables.append(code.send(symbols[-1]))
        except StopIteration:
            return Coded(symbols, tables)


def chosen(masses: Table, uniform: Integers) -> Symbols:
    """The symbols [N] that hold the uniform numbers [N] from 0 to 2^PRECISION - 1, by the inverse distribution function."""
    below = np.cumsum(masses.astype(np.int64) + 1, axis=1)[:, :-1]
    symbols: Symbols = (below <= uniform[:, None]).sum(1).astype(np.int32)
    return symbols
