"""The stack: its words are those of the definition in plain integers, and what is popped can be pushed back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaescale.compression import ans
from vaescale.compression.bins import prior_code
from vaescale.compression.masses import Coded, table
from vaescale.errors import UserError

pytest.importorskip("constriction")


def one_round(weights):
    yield table(weights)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 60), st.integers(2, 6))
def test_the_words_are_those_of_the_definition(seed: int, symbols: int, number: int, words: int) -> None:
    generator = np.random.default_rng(seed)
    masses = table([generator.random(number) ** 9 for _ in range(symbols)])
    given_words = generator.integers(1, 2**32, words, dtype=np.uint32)
    values = generator.integers(0, symbols, number).astype(np.int32)
    stack = ans.Stack(given_words, sealed=True)
    stack.push(Coded([values], [masses]))
    expected = ans.reference_words(values, masses.astype(np.int64) + 1, tuple(given_words.tolist()))
    assert stack.words().tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 300))
def test_what_is_popped_of_any_bits_can_be_pushed_back(seed: int, words: int, number: int) -> None:
    """Even when the stack runs empty."""
    generator = np.random.default_rng(seed)
    bottom = generator.integers(0, 2**32, words, dtype=np.uint32)
    weights = [generator.random(number) for _ in range(4)]
    stack = ans.Stack(bottom)
    popped = stack.pop(one_round(weights))
    flat = stack.pop(prior_code(number, 4))
    stack.push(flat)
    stack.push(popped)
    left = stack.given_words()
    assert left is not None
    assert left.tolist() == bottom.tolist()


def test_the_length_is_the_sum_of_the_logarithms_of_the_masses() -> None:
    generator = np.random.default_rng(0)
    weights = [generator.random(50_000) ** 4 for _ in range(4)]
    stack = ans.Stack(generator.integers(1, 2**32, 4, dtype=np.uint32))
    before = stack.bits
    masses = table(weights)
    symbols = generator.integers(0, 4, 50_000).astype(np.int32)
    one = Coded([symbols], [masses])
    stack.push(one)
    assert stack.bits - before == pytest.approx(sum(bits.sum() for bits in one.bits), rel=1e-4, abs=64)


def test_a_stack_of_damaged_words_or_with_something_left_is_noticed() -> None:
    with pytest.raises(UserError, match="damaged"):
        ans.Stack(np.array([5, 0], np.uint32), sealed=True)
    stack = ans.Stack(np.array([5, 6], np.uint32))
    stack.pop(prior_code(40, 4))
    left = stack.given_words()
    assert left is None or left.tolist() != [5, 6]


def test_a_library_with_other_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import constriction

    monkeypatch.setattr(ans, "reference_words", lambda *_: [1, 2, 3])
    with pytest.raises(UserError, match="codes known symbols in other words"):
        ans._refuse_other_words(constriction)
