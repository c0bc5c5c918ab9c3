"""The stack of bits that symbols are pushed on and popped from: asymmetric numeral systems. Duda 2009.

The coder is that of `constriction` (Bamler 2022): a state of 64 bits over a stack of 32-bit words. What is popped under any tables
and pushed again under the same ones leaves every bit as it was, which is what bits back needs. Its quantization of float32 weights
is exact for weights that are whole numbers with the sum that `masses.table` gives; `test_words` shows that this is so here.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.compression.masses import BASE, PRECISION, Code, Coded, received
from vaescale.errors import UserError

Words = NDArray[np.uint32]
WORD_BITS = 32
KNOWN = (1779033703, 3144134277, 1013904242, 2773480762)  # of sqrt(2), sqrt(3), sqrt(5) and sqrt(7)


class Stack:
    """A stack of bits on top of given words, which are any words."""

    def __init__(self, words: Words, *, sealed: bool = False) -> None:
        """sealed: whether the words are those of a former stack, from `words`."""
        library = _library()
        try:
            self._coder = library.stream.stack.AnsCoder(np.ascontiguousarray(words), seal=not sealed)
        except ValueError as error:
            raise UserError(f"the words of a stack are damaged: {error}") from None
        self._family = library.stream.model.Categorical(perfect=False, lazy=True)

    @property
    def bits(self) -> int:
        """The number of bits on the stack, in whole words."""
        return WORD_BITS * int(self._coder.num_words())

    def pop(self, code: Code) -> Coded:
        """Decode the symbols of a code."""
        return received(code, lambda table: self._coder.decode(self._family, table))

    def push(self, coded: Coded) -> None:
        """Encode the symbols of a code, so that `pop` returns them."""
        for symbols, table in zip(reversed(coded.symbols), reversed(coded.tables), strict=True):
            self._coder.encode_reverse(symbols, self._family, table)

    def words(self) -> Words:
        """All words, from which `Stack(words, sealed=True)` goes on."""
        words: Words = self._coder.get_compressed()
        return words

    def given_words(self) -> Words | None:
        """The words that the stack was made of, when all that was pushed is popped; None if something is left or missing."""
        try:
            words: Words = self._coder.get_compressed(unseal=True)
        except (AssertionError, ValueError):  # which of them depends on what is left
            return None
        return words


@lru_cache
def _library() -> Any:
    import constriction

    _refuse_other_words(constriction)
    return constriction


def _refuse_other_words(library: Any) -> None:
    """Refuse a version of the library that codes the same symbols in other words."""
    rows = np.arange(64)[:, None] * np.arange(1, BASE)
    weights = np.concatenate([rows * 65_537 % (1 << 20), np.zeros((64, 1), np.int64)], axis=1)
    weights[:, -1] = (1 << PRECISION) - BASE - weights.sum(1)
    coder = library.stream.stack.AnsCoder(np.array(KNOWN, np.uint32))
    coder.encode_reverse(
        (np.arange(64) % BASE).astype(np.int32),
        library.stream.model.Categorical(perfect=False, lazy=True),
        weights.astype(np.float32),
    )
    words = coder.get_compressed()
    if words.tolist() != reference_words(np.arange(64) % BASE, weights + 1, KNOWN):
        raise UserError(
            f"constriction {getattr(library, '__version__', '')} codes known symbols in other words than version 0.5; "
            "pip install 'constriction~=0.5'"
        )


def reference_words(
    symbols: NDArray[np.int64], masses: NDArray[np.int64], words: tuple[int, ...]
) -> list[int]:
    """The words after pushing symbols [N] with masses [N, S], the last one first, in Python's integers: the definition of the format."""
    stack, state = list(words), 0
    while stack and state < 1 << WORD_BITS:
        state = state << WORD_BITS | stack.pop()
    for symbol, row in zip(symbols[::-1].tolist(), masses[::-1].tolist(), strict=True):
        mass, below = row[symbol], sum(row[:symbol])
        if state >> (2 * WORD_BITS - PRECISION) >= mass:
            stack.append(state & 0xFFFFFFFF)
            state >>= WORD_BITS
        state = (state // mass << PRECISION) + below + state % mass
    while state:
        stack.append(state & 0xFFFFFFFF)
        state >>= WORD_BITS
    return stack
