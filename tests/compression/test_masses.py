"""Whole-number masses: they sum to 2^24, digits lose nothing, and the arithmetic below them is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, ndtr

from vaescale.compression import arithmetic, bins
from vaescale.compression.masses import (
    PRECISION,
    by_digits,
    chosen,
    coded,
    digits_of,
    from_digits,
    received,
    table,
)


def test_functions_are_close_to_those_of_scipy() -> None:
    x = np.linspace(-60, 60, 20_001)
    assert np.abs(arithmetic.exponential(x) / np.exp(x) - 1).max() < 1e-12
    assert np.abs(arithmetic.logistic(x) - expit(x)).max() < 1e-12
    assert np.abs(arithmetic.normal_cdf(x) - ndtr(x)).max() < 8e-8
    positive = np.concatenate([np.exp(x * 10), np.linspace(0.5, 2, 999)])
    assert np.allclose(arithmetic.logarithm(positive), np.log(positive), rtol=5e-16, atol=2e-16)
    far = arithmetic.normal_cdf(np.array([-np.inf, -1e6, 1e6, np.inf]))
    assert far.tolist() == [0, 0, 1, 1]
    assert np.isfinite(arithmetic.exponential(np.array([-1e9, 1e9]))).all()


def test_the_bits_of_the_functions_are_known() -> None:
    """Another processor, numpy or compiler must give these bits too: files depend on them."""
    x = np.array([-30.0, -1.5, 0.1, 2.0, 11.0])
    assert [value.hex() for value in arithmetic.exponential(x)] == KNOWN_EXPONENTIALS
    assert [value.hex() for value in arithmetic.normal_cdf(x)] == KNOWN_NORMALS
    assert [value.hex() for value in arithmetic.logarithm(np.abs(x))] == KNOWN_LOGARITHMS


KNOWN_EXPONENTIALS = [
    "0x1.a56e0c2ac7f78p-44",
    "0x1.c8f87724b5c1dp-3",
    "0x1.1aec7b35a00d4p+0",
    "0x1.d8e64b8d4ddaep+2",
    "0x1.d3c4488ee4f7fp+15",
]
KNOWN_LOGARITHMS = [
    "0x1.b35a6f90bd69bp+1",
    "0x1.9f323ecbf984cp-2",
    "-0x1.26bb1bbb55515p+1",
    "0x1.62e42fefa39efp-1",
    "0x1.32ee3b77f374cp+1",
]
KNOWN_NORMALS = [
    "0x1.a8e31216ff5cep-656",
    "0x1.11a474e7d6d8ep-4",
    "0x1.1464526f5dd4ep-1",
    "0x1.f45a1a975568fp-1",
    "0x1.0000000000000p+0",
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=2, max_size=4),
)
def test_a_table_sums_to_its_precision_and_every_symbol_has_a_mass(weights: list[list[float]]) -> None:
    columns = [np.array(column) for column in weights]
    masses = table(columns).astype(np.int64) + 1
    assert masses.sum(1).tolist() == [1 << PRECISION] * 3
    assert masses.min() >= 1
    total = np.sum(columns, axis=0) + len(columns) * 2.0**-60
    for symbol, column in enumerate(columns):
        assert masses[:, symbol] / 2**PRECISION == pytest.approx(
            (column + 2.0**-60) / total, abs=6 / 2**PRECISION
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 16, 64, 256]), st.integers(1, 9))
def test_digits_cost_what_their_value_costs(seed: int, levels: int, number: int) -> None:
    generator = np.random.default_rng(seed)
    masses = generator.dirichlet(np.full(levels, 0.5), size=number).T
    below = np.concatenate([np.zeros((1, number)), masses.cumsum(0)])
    below /= below[-1].copy()
    values = np.array([generator.choice(levels, p=masses[:, n]) for n in range(number)])

    def cdf(edges):
        return below[edges, np.arange(number)]

    one = coded(by_digits(cdf, number, levels), digits_of(values, levels))
    assert from_digits(one.symbols).tolist() == values.tolist()
    exact = -np.log2(below[values + 1, np.arange(number)] - below[values, np.arange(number)])
    assert np.sum(one.bits, axis=0) == pytest.approx(exact, rel=1e-3, abs=1e-3)


def test_symbols_are_chosen_as_often_as_their_masses_say() -> None:
    number = 4096
    even = np.arange(number) * (1 << PRECISION) // number
    weights = [np.full(number, share) for share in (0.1, 0.2, 0.7)]
    counts = np.bincount(chosen(table(weights), even), minlength=3)
    assert counts == pytest.approx([0.1 * number, 0.2 * number, 0.7 * number], abs=1)


@pytest.mark.parametrize("prior", [None, (0.4, -0.9)])
def test_bins_have_equal_mass_and_the_posterior_adds_up(prior: tuple[float, float] | None) -> None:
    bits = 8
    every = np.arange(1 << bits)
    p = None if prior is None else np.repeat(prior, len(every))[None]
    mean, log_sigma = prior or (0.0, 0.0)
    latents = bins.latents(every[None], p, bits)[0]
    assert (np.diff(latents) > 0).all()
    shares = ndtr((latents - mean) / np.exp(log_sigma))
    assert shares * (1 << bits) == pytest.approx(every + 0.5, abs=1e-5)
    q = np.repeat([0.7, -1.2], len(every))[None]
    one = coded(bins.posterior_code(q, p, bits), digits_of(every, 1 << bits))
    mass = 2.0 ** -np.sum(one.bits, axis=0)
    assert mass.sum() == pytest.approx(1, abs=1e-6)
    assert (mass * latents).sum() == pytest.approx(0.7, abs=2e-3)
    flat = coded(bins.prior_code(len(every), bits), digits_of(every, 1 << bits))
    assert np.sum(flat.bits, axis=0) == pytest.approx(bits, abs=1e-5)


def test_the_code_decides_how_many_symbols_are_received() -> None:
    one = received(bins.prior_code(3, 6), lambda shown: np.full(len(shown), 2, np.int32))
    assert from_digits(one.symbols).tolist() == [0b101010] * 3
