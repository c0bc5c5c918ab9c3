"""Schedules against hand-computed values."""

import itertools
import math

import pytest

from vaescale.schedules import SCHEDULES, Annealing, annealed, constant, warmup_cosine


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


def values(of: range, **keys: object) -> list[float]:
    return [annealed(Annealing(**keys), step) for step in of]


def test_a_number_stays_what_it_is() -> None:
    assert annealed(0.3, 0) == annealed(0.3, 10**6) == 0.3


def test_linear_annealing_by_hand() -> None:
    got = values(range(0, 7, 2), schedule="linear", steps=4, start=1.0, end=3.0)
    assert got == [1.0, 2.0, 3.0, 3.0]


def test_cosine_annealing_by_hand() -> None:
    got = values(range(0, 9, 2), schedule="cosine", steps=6)
    assert got == pytest.approx([0, 0.25, 0.75, 1, 1])


def test_sigmoid_annealing_by_hand() -> None:
    """From -6 to 6, stretched to reach 0 and 1."""
    got = values(range(5), schedule="sigmoid", steps=4)
    low = 1 / (1 + math.exp(6))
    quarter = (1 / (1 + math.exp(3)) - low) / (1 - 2 * low)
    assert got == pytest.approx([0, quarter, 0.5, 1 - quarter, 1])


def test_cyclical_annealing_by_hand() -> None:
    """Fu et al. 2019, eq. 6: two cycles of 10 steps, half of each rising; then 1."""
    got = values(range(22), schedule="cyclical", steps=20, cycles=2)
    cycle = [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]
    assert got == pytest.approx([*cycle, *cycle, 1, 1])
    whole = values(range(10), schedule="cyclical", steps=20, cycles=2, rising=1.0)
    assert whole == pytest.approx([step / 10 for step in range(10)])
    assert values(range(0, 20, 5), schedule="cyclical", steps=20) == [0, 0, 0, 0], "four cycles by default"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_annealing_may_fall_too(schedule: str) -> None:
    got = values(range(20), schedule=schedule, steps=15, start=10.0, end=1.0)
    assert got[0] == 10
    assert got[15:] == [1.0] * 5
    assert all(later <= earlier for earlier, later in itertools.pairwise(got))
