"""The grid: values that differ in their last bits round alike, also those that began in the middle between two multiples."""

import numpy as np
import pytest

from vaescale.compression.rounding import GRID, margin_of, on_grid, settle
from vaescale.errors import UserError


def test_values_that_differ_by_less_than_the_margin_round_alike() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(40, 3000)) * 5
    middles = (generator.integers(-1000, 1000, (40, 2)) + 0.5) * GRID
    values[:, :2] = middles + generator.uniform(-1e-12, 1e-12, (40, 2))
    margin = margin_of(values.shape[1])
    settled = settle(values, margin)
    assert (settled.phases > 0).all(), "each image has a value in a middle of the first grid"
    assert np.abs(settled.values - values).max() <= GRID / 2 * 1.01
    other = values + generator.uniform(-0.9, 0.9, values.shape) * margin
    assert np.array_equal(on_grid(other, settled.phases), settled.values)
    plain = np.zeros_like(settled.phases)
    assert not np.array_equal(on_grid(other, plain), on_grid(values, plain)), "without phases they differ"


def test_images_with_more_values_have_a_smaller_margin() -> None:
    assert margin_of(1) == 2.0**-36
    assert margin_of(1 << 18) == 2.0**-38
    assert margin_of(1 << 40) == 2.0**-44


def test_values_without_a_grid_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        settle(np.array([[0.0, np.nan]]), 1e-11)
    everywhere = np.linspace(0, GRID, 4096)[None]
    with pytest.raises(UserError, match="has no grid"):
        settle(everywhere, GRID / 1000)
