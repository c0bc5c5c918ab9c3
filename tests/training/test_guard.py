"""Which steps are skipped, that skipping ends, and that all ranks decide as one."""

import math
from pathlib import Path

import pytest
import torch

from tests.ranks import on_ranks
from vaescale import comm
from vaescale.errors import TrainingStopped
from vaescale.training.guard import Guard

CPU = torch.device("cpu")


def guard(
    factor: float | None = 10.0, most: int = 3, *, clip_norm: float | None = None, scaled: bool = False
) -> Guard:
    return Guard(skip_factor=factor, clip_norm=clip_norm, max_non_finite=most, scaled=scaled, device=CPU)


def feed(own: Guard, norms: list[float], *, loss: float = 1.0, start: int = 0) -> list[bool]:
    """The gradient's norms as they come, so times the scale where there is one."""
    return [
        bool(own.judge(torch.tensor(loss), torch.tensor(norm), step=step).found_inf)
        for step, norm in enumerate(norms, start=start)
    ]


def refuse(own: Guard, *, last_step: int = 1000) -> None:
    own.refuse(own.reports(wait=True), last_step=last_step)


def test_ordinary_steps_pass_and_a_leap_does_not() -> None:
    own = guard()
    assert not any(feed(own, [5.0, 8.0, 3.0] * 20))
    assert feed(own, [1000.0, 5.0, 49.0, 60.0]) == [True, False, False, True]
    assert own.metrics() == {"train/skipped_steps": 2}


def test_nothing_is_skipped_before_it_knows_what_is_usual() -> None:
    assert not any(feed(guard(), [1.0, 1000.0, 0.001, 1e6]))


def test_a_bound_once_exceeded_recovers() -> None:
    """The fixed one of the reference code skips for ever. From 1 to 1000 with a factor of 10 the bound must rise 100-fold:
    each skipped step raises it by 10^(1/100).
    """
    own = guard()
    feed(own, [1.0] * 2000)
    skipped = feed(own, [1000.0] * 400)
    first_taken = skipped.index(False)
    assert 190 <= first_taken <= 210
    assert not any(skipped[first_taken:])


def test_without_a_factor_only_nan_is_skipped() -> None:
    own = guard(factor=None)
    feed(own, [1.0] * 100)
    assert feed(own, [1e30, math.nan, math.inf, 1.0]) == [False, True, True, False]
    assert feed(own, [1.0], loss=math.nan) == [True]
    assert feed(own, [1.0], loss=math.inf) == [True]


def test_nan_in_a_row_stops_and_one_good_step_forgives() -> None:
    own = guard(most=3)
    feed(own, [1.0, math.nan])
    assert own.is_well, "it moved nothing"
    refuse(own, last_step=1)
    feed(own, [math.nan], start=2)
    reports = own.reports(wait=True)
    own.refuse(reports, last_step=1000)
    assert not own.is_well
    with pytest.raises(TrainingStopped, match=r"for 2 steps at step 3 \(the last one\); lower optimizer.lr"):
        own.refuse(reports, last_step=2)
    feed(own, [1.0], start=3)
    assert own.is_well
    refuse(own, last_step=3)
    feed(own, [math.nan] * 3, start=4)
    with pytest.raises(TrainingStopped, match=r"for 3 steps at step 7.*max_non_finite is 3"):
        refuse(own)


def test_each_step_is_reported_once_and_one_step_later() -> None:
    own, seen = guard(most=4), []
    norms = [1.0, math.nan, math.nan, 1.0, math.inf, math.nan, 1.0]
    for step, norm in enumerate(norms):
        feed(own, [norm], start=step)
        reports = own.reports(wait=False)
        assert [report.step for report in reports] == ([step - 1] if step else [])
        seen += reports
    seen += own.reports(wait=True)
    assert own.reports(wait=True) == []
    assert [report.step for report in seen] == list(range(len(norms)))
    assert [report.step for report in seen if report.non_finite] == [1, 2, 4, 5]
    assert [report.in_a_row for report in seen] == [0, 1, 2, 0, 1, 2, 0]


def test_what_ends_training_is_reported_with_the_step_that_came_after() -> None:
    """The step that runs while the host reads the one before may be another one of NaN: its images are named, too."""
    own = guard(most=2)
    feed(own, [math.nan] * 2)
    assert [report.step for report in own.reports(wait=False)] == [0]
    feed(own, [math.nan], start=2)
    reports = own.reports(wait=False)
    assert [(report.step, report.in_a_row) for report in reports] == [(1, 2), (2, 3)]
    with pytest.raises(TrainingStopped, match="for 2 steps at step 2"):
        own.refuse(reports, last_step=1000)


def test_a_restored_guard_reports_no_step_from_before() -> None:
    own = guard()
    saved = own.state.to_tensor()
    feed(own, [math.nan] * 2)
    own.load(saved)
    assert own.reports(wait=True) == []
    feed(own, [1.0], start=5)
    assert [report.step for report in own.reports(wait=True)] == [5]


def test_the_saved_numbers_are_those_of_earlier_checkpoints() -> None:
    """Seven numbers in this order; the fields have names, the file has one tensor."""
    saved = torch.tensor([0.5, 0.25, 3.0, 1.0, 40.0, 1.0, 7.0], dtype=torch.float64)
    own = guard()
    own.load(saved)
    state = own.state
    assert (float(state.usual.log_norm), float(state.usual.weight), float(state.skipped)) == (0.5, 0.25, 3)
    assert (float(state.non_finite_in_a_row), own.last_non_finite) == (1, 40)
    assert (float(state.scale.value), float(state.scale.finite_steps)) == (1, 7)
    assert torch.equal(state.to_tensor(), saved)


def test_the_state_is_all_there_is() -> None:
    own, other = guard(), guard()
    feed(own, [1.0, 2.0, math.nan] * 20)
    other.load(own.state.to_tensor())
    norms = [3.0, 100.0, 1.0, math.nan]
    assert feed(own, norms) == feed(other, norms)
    assert torch.equal(own.state.to_tensor(), other.state.to_tensor())


def test_a_norm_of_zero_is_no_fault() -> None:
    own = guard()
    assert not any(feed(own, [0.0] * 3))
    assert torch.isfinite(own.state.to_tensor()).all()
    usual = guard()
    feed(usual, [1.0] * 200)
    assert not any(feed(usual, [0.0] + [1.0] * 300)), "one zero must not make ordinary steps unusual"


def sixty_steps(rank: int, ranks: int) -> torch.Tensor:
    own, skipped = guard(), []
    for step in range(60):
        comm.at_step(step)
        # One rank alone has a loss of NaN at step 40; the gradient's norm is everyone's.
        loss = math.nan if step == 40 and rank == 1 else 1.0
        norm = 500.0 if step == 50 else 2.0 + rank * 1e-7
        verdict = own.judge(
            torch.tensor(loss), torch.tensor(norm), step=step, asked_to_stop=rank == 1 and step == 30
        )
        skipped += [bool(verdict.found_inf)]
        # One rank alone was asked at step 30; all of them know it one step later.
        reports = own.reports(wait=False)
        asked = [report.step for report in reports if report.asked_to_stop]
        assert asked == ([30] if step == 31 else [])
        non_finite = [report.step for report in reports if report.non_finite]
        assert non_finite == ([40] if step == 41 else [])
    assert [step for step, skip in enumerate(skipped) if skip] == [40, 50]
    assert own.last_non_finite == 40
    return own.state.to_tensor()


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_decide_as_one(tmp_path: Path) -> None:
    assert torch.equal(*on_ranks(tmp_path, sixty_steps))


def test_the_gradient_is_divided_by_scale_and_clip() -> None:
    verdict = guard(clip_norm=5.0).judge(torch.tensor(1.0), torch.tensor(20.0), step=0)
    assert (float(verdict.grad_norm), float(verdict.grad_scale), float(verdict.found_inf)) == (20, 4, 0)
    assert float(guard(clip_norm=50.0).judge(torch.tensor(1.0), torch.tensor(20.0), step=0).grad_scale) == 1
    scaled = guard(clip_norm=5.0, scaled=True)
    verdict = scaled.judge(torch.tensor(1.0), 20 * scaled.scale, step=0)
    assert (float(verdict.grad_norm), float(verdict.grad_scale)) == (20, 4 * 2.0**16)


def test_a_scale_falls_until_gradients_fit_and_grows_again() -> None:
    own = guard(scaled=True)
    assert feed(own, [math.inf] * 16) == [True] * 16
    assert float(own.scale) == 1
    assert own.is_well, "an overflow is no fault while there is scale to take away"
    assert own.last_non_finite == -1
    feed(own, [math.inf] * 2)
    assert not own.is_well
    feed(own, [1.0] * 1999)
    assert float(own.scale) == 1
    feed(own, [1.0])
    assert float(own.scale) == 2
    assert own.metrics() == {"train/skipped_steps": 18, "train/loss_scale": 2}
    feed(own, [1.0], loss=math.nan)
    assert float(own.scale) == 2, "a loss that is not finite does not come from its scale"
    assert own.last_non_finite == 0


def test_a_change_of_precision_brings_its_own_scale() -> None:
    half, full = guard(scaled=True), guard(clip_norm=5.0)
    feed(half, [math.inf] * 4)
    full.load(half.state.to_tensor())
    verdict = full.judge(torch.tensor(1.0), torch.tensor(20.0), step=0)
    assert (float(verdict.grad_norm), float(verdict.grad_scale)) == (20, 4)
    again, back = guard(scaled=True), guard(scaled=True)
    again.load(half.state.to_tensor())
    assert torch.equal(again.state.to_tensor(), half.state.to_tensor())
    back.load(full.state.to_tensor())
    assert float(back.scale) == 2.0**16
