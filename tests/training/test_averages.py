"""Averages of the weights: their profiles, and one of another length from saved ones."""

import math

import numpy as np
import pytest

from vaescale.training.averages import Average, gamma_of, mix, name_of

KINDS = {
    "warmed up": Average(0.99),
    "from the first step": Average(0.9, warmup=False),
    "power": Average(gamma=6.94),
    "a short power": Average(gamma=16.97),
}


@pytest.mark.parametrize("average", KINDS.values(), ids=KINDS)
def test_the_profile_is_what_the_recursion_gives(average: Average) -> None:
    factors = np.zeros(41)
    factors[0] = 1  # the initial weights
    for step in range(40):
        factors *= 1 - average.weight(step)
        factors[step + 1] += average.weight(step)
    np.testing.assert_allclose(average.profile(40), factors, atol=1e-15)
    assert factors.sum() == pytest.approx(1)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_the_published_ones(sigma_rel: float, gamma: float) -> None:
    """Karras et al. 2024, section 3.1."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_has_the_width_that_was_asked_for(sigma_rel: float) -> None:
    steps = 20_000
    factors = Average(gamma=gamma_of(sigma_rel)).profile(steps)
    at = np.arange(steps + 1) / steps
    mean = (factors * at).sum()
    assert math.sqrt((factors * (at - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=2e-3)


def test_no_width_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="must be above 0 and below"):
        gamma_of(0.2887)


@pytest.mark.parametrize(
    "wished", [Average(gamma=gamma_of(0.08)), Average(gamma=gamma_of(0.15)), Average(0.995)]
)
def test_another_length_is_put_together_from_saved_averages(wished: Average) -> None:
    """On weights that drift and shake as in training, within a few percent of how far averages of other lengths are."""
    steps, every = 4000, 200
    generator = np.random.default_rng(0)
    drift = np.exp(-np.arange(steps + 1) / 800)[:, None] * generator.normal(size=50)
    history = drift + 0.3 * generator.normal(size=(steps + 1, 50))
    kinds = [Average(gamma=gamma_of(sigma)) for sigma in (0.05, 0.1)]
    saved = [(step, kind) for step in range(every, steps + 1, every) for kind in kinds]
    values = [kind.profile(step) @ history[: step + 1] for step, kind in saved]
    mixed = mix(saved, (steps, wished))
    assert mixed.factors.sum() == pytest.approx(1)
    assert mixed.error < 0.2
    truth = wished.profile(steps) @ history
    error = np.linalg.norm(mixed.factors @ values - truth)
    others = min(np.linalg.norm(value - truth) for value in values)
    assert error < 0.35 * others


def test_a_saved_average_is_itself() -> None:
    saved = [(100, Average(0.9)), (200, Average(0.9)), (200, Average(gamma=5.0))]
    mixed = mix(saved, (200, Average(0.9)))
    np.testing.assert_allclose(mixed.factors, [0, 1, 0], atol=1e-9)
    assert mixed.error < 1e-9


def test_later_averages_cannot_be_taken_apart() -> None:
    with pytest.raises(ValueError, match="of a step after 100"):
        mix([(100, Average(0.9)), (200, Average(0.9))], (100, Average(0.5)))


def test_names() -> None:
    assert name_of(0.9999, None) == "ema-0.9999"
    assert name_of(None, 0.05) == "ema-sigma-0.05"
