"""Schedules against hand-computed values."""

import itertools
import math

import pytest

from vaescale.schedules import SCHEDULES, constant, warmup_cosine


def test_warmup_is_linear_and_the_cosine_meets_both_ends() -> None:
    values = [warmup_cosine(step, total_steps=104, warmup_steps=4, final_fraction=0.1) for step in range(104)]
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[-1] == pytest.approx(0.1)
    third = 4 + 33  # a third of the 99 steps from peak to end: cos(pi / 3) = 1/2
    assert values[third] == pytest.approx(0.1 + 0.9 * 0.75)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[4:]))


def test_without_warmup_the_first_step_is_full() -> None:
    for schedule in SCHEDULES.values():
        assert schedule(0, total_steps=10, warmup_steps=0, final_fraction=0.0) == 1.0


def test_constant_stays() -> None:
    assert constant(2, total_steps=10, warmup_steps=4, final_fraction=0.0) == 0.75
    assert constant(9, total_steps=10, warmup_steps=4, final_fraction=0.0) == 1.0


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_do_not_divide_by_zero(total: int) -> None:
    for warmup in range(4):
        value = warmup_cosine(total - 1, total_steps=total, warmup_steps=warmup, final_fraction=0.0)
        assert math.isfinite(value)
        assert 0 <= value <= 1
