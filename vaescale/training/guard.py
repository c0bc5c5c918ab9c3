"""The guard of a training step: it decides on the device, equally on all ranks, whether the step moves the weights.

A step whose loss or gradient is NaN or Inf on any rank moves no weights on any rank. Neither does a step whose gradient norm
is far above the usual one (`outliers.py`), nor one whose float16 gradient overflows (`loss_scale.py`). One all-reduce per step
decides this, and carries whether a rank was asked to stop. The host reads the outcome one step later (`later.py`).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import NotFinite
from vaescale.training.later import Later
from vaescale.training.loss_scale import FIRST_SCALE, GROWTH_STEPS, LARGEST_SCALE, LossScale
from vaescale.training.outliers import HORIZON_STEPS, UsualNorm
from vaescale.training.strategies.base import Verdict

REPORTED = 5  # the sums of a step over the ranks, and the number of NaN in a row
DOUBTFUL = 2  # steps of NaN in a row, after which the weights themselves may be the cause


class GuardState(NamedTuple):
    """The guard's statistics of the steps so far: float64 [] each, on the device.

    last_non_finite: the last step whose loss or gradient was NaN or Inf, -1 before any. The guard and checkpoints hold the seven
    numbers as one tensor in this order.
    """

    usual: UsualNorm
    skipped: Tensor
    non_finite_in_a_row: Tensor
    last_non_finite: Tensor
    scale: LossScale

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> "GuardState":
        """The state in the tensor of `to_tensor`, float64 [7]; the fields share its memory."""
        log_norm, weight, skipped, in_a_row, last, scale, finite_steps = numbers.unbind()
        return cls(UsualNorm(log_norm, weight), skipped, in_a_row, last, LossScale(scale, finite_steps))

    def to_tensor(self) -> Tensor:
        """All numbers in the order of the fields, float64 [7]."""
        faults = (self.skipped, self.non_finite_in_a_row, self.last_non_finite)
        return torch.stack([*self.usual, *faults, *self.scale])


class Rules(NamedTuple):
    """How a step changes the numbers of GuardState, float64 [7] each, so that a few operations on vectors update all of them.

    A finite step adds `finite_adds`, then moves each number by its rate towards its target, the first one's target times what
    was learned; a step of NaN or Inf multiplies the numbers by `kept`, then adds `fault_adds` and the step times `fault_step`.
    A float16 overflow multiplies by `overflow_kept` and adds `overflow_adds`; many finite steps multiply by `grown`.
    """

    finite_adds: Tensor
    rates: Tensor
    targets: Tensor
    learned: Tensor
    exceeded: Tensor
    kept: Tensor
    fault_adds: Tensor
    fault_step: Tensor
    overflow_kept: Tensor
    overflow_adds: Tensor
    grown: Tensor

    @classmethod
    def on(cls, device: torch.device) -> "Rules":
        """The rules on a device."""
        rate = 1 / HORIZON_STEPS
        rows = [
            # log norm, its weight, skipped, non-finite in a row, the last one, loss scale, finite steps
            [0, 0, 0, 0, 0, 0, 1],
            [rate, rate, 0, 1, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 1, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0],
            [1, 1, 1, 1, 1, 0.5, 0],
            [0, 0, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 2, 0],
        ]
        return cls(*torch.tensor(rows, dtype=torch.float64, device=device).unbind())


class StepReport(NamedTuple):
    """The outcome of a step, as the host reads it, equal on all ranks.

    non_finite: whether loss or gradient was NaN or Inf for another reason than a float16 overflow; in_a_row: how many
    such steps in a row ended with this one; asked_to_stop: whether a rank was asked to stop.
    """

    step: int
    non_finite: bool
    in_a_row: int
    asked_to_stop: bool


class Guard:
    """The judge of each step. It never makes the host wait for the device."""

    def __init__(
        self,
        *,
        max_non_finite: int,
        device: torch.device,
        skip_factor: float | None = None,
        skip_norm: float | None = None,
        clip_norm: float | None = None,
        scaled: bool = False,
    ) -> None:
        """Create a guard. scaled: whether the loss is multiplied by `scale` before the backward pass, as float16 needs."""
        self._factor, self._clip_norm, self._scaled = skip_factor, clip_norm, scaled
        self._log_most = math.log(skip_norm) if skip_norm else None
        self._max_non_finite = max_non_finite
        self._rules = Rules.on(device)
        first = [0, 0, 0, 0, -1, FIRST_SCALE if scaled else 1.0, 0]
        self._numbers = torch.tensor(first, dtype=torch.float64, device=device)
        self._no, self._yes = (
            torch.full((1,), value, dtype=torch.float64, device=device) for value in (0, 1)
        )
        self._one = self._yes[0]
        self._asked_alone = torch.cat([self._no, self._no, self._no, self._yes])
        self._later = Later(REPORTED, device)

    @property
    def state(self) -> GuardState:
        """The statistics of the steps so far."""
        return GuardState.from_tensor(self._numbers)

    def load(self, saved: Tensor) -> None:
        """Continue from the tensor of a checkpoint, float64 [7].

        Its loss scale is used only if the loss was scaled then and is scaled now: the precision may have changed.
        """
        numbers = saved.to(self._no)
        state = GuardState.from_tensor(numbers)
        scaled_before = float(state.scale.value) != 1
        if not self._scaled or not scaled_before:
            value = torch.full_like(state.scale.value, FIRST_SCALE if self._scaled else 1.0)
            state = state._replace(scale=LossScale(value, state.scale.finite_steps))
        self._numbers = state.to_tensor()
        self._later.clear()

    @property
    def scale(self) -> Tensor | None:
        """Factor of a rank's loss before the backward pass, float32 []; None where the loss is not scaled.

        The rank's loss is a mean over its own images. The factor is divided by the number of ranks, so that an image's
        gradient is as large as on one process and overflows at the same scale.
        """
        return (self.state.scale.value / comm.world_size()).float() if self._scaled else None

    def judge(self, loss: Tensor, grad_norm: Tensor, *, step: int, asked_to_stop: bool = False) -> Verdict:
        """Decide whether and how far a step moves the weights. All ranks call it once per step.

        loss []: this rank's loss; grad_norm []: the norm of the global gradient of the scaled loss, before clipping.
        """
        both = torch.stack([loss.detach(), grad_norm]).double()
        norm, divided_by = both[1], None
        if self._scaled:
            divided_by = self.state.scale.value / comm.world_size()
            norm = norm / divided_by
        faults = (both - both) != 0  # NaN and Inf
        asked = self._yes if asked_to_stop else self._no
        sums = comm.all_reduce_sum(torch.cat([faults, norm.clamp_min(1e-300).log().view(1), asked]))
        finite = (sums[:2] == 0).all()
        skip, sums = self._update(sums, finite, step)
        self._later.put(step, torch.cat([sums, self._numbers[3:4]]))
        divisor = self._one
        if self._clip_norm or divided_by is not None:
            clipped = (norm / self._clip_norm).clamp_min(1) if self._clip_norm else torch.ones_like(norm)
            clipped = clipped if divided_by is None else clipped * divided_by
            # Where no weights move, the gradient is divided by one: NaN would stay NaN, but Inf / Inf would be another fault.
            divisor = torch.where(finite, clipped, self._one)
        unscaled = grad_norm if divided_by is None else norm
        return Verdict(unscaled.float(), divisor.float(), skip.float())

    def _update(self, sums: Tensor, finite: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Add a step to the numbers. Returns whether it is skipped, bool [], and the sums without an overflow's faults."""
        rules, numbers, state = self._rules, self._numbers, self.state
        log_norm = sums[2] / comm.world_size() if comm.world_size() > 1 else sums[2]
        skip = ~finite
        learned = log_norm
        after = numbers + rules.finite_adds
        if self._factor:
            exceeded = state.usual.is_exceeded(log_norm, factor=self._factor)
            skip, learned = skip | exceeded, state.usual.learned(log_norm, factor=self._factor)
        if self._log_most is not None:
            skip = skip | (log_norm >= self._log_most)
        if self._factor or self._log_most is not None:
            after = torch.addcmul(after, rules.exceeded, skip.double())
        after = torch.lerp(after, torch.addcmul(rules.targets, rules.learned, learned), rules.rates)
        faulty = torch.addcmul(rules.fault_adds, numbers, rules.kept).add_(rules.fault_step, alpha=step)
        if self._scaled:
            overflows = state.scale.explains(loss_is_finite=sums[0] == 0, norm_is_finite=sums[1] == 0)
            overflowed = torch.addcmul(rules.overflow_adds, numbers, rules.overflow_kept)
            faulty = torch.where(overflows, overflowed, faulty)
            after = torch.where(after[6] >= GROWTH_STEPS, after * rules.grown, after)
            sums = torch.where(overflows, sums * self._asked_alone, sums)
        self._numbers = torch.where(finite, after, faulty)
        if self._scaled:
            self._numbers[5].clamp_(1, LARGEST_SCALE)
        return skip, sums

    def reports(self, *, wait: bool) -> list[StepReport]:
        """Reports of the judged steps that were not reported yet, oldest first; without `wait`, all but the last one.

        All ranks get the same reports at the same step. When a report ends training, the last step's report is included, so
        that no step is left out.
        """
        reports = self._take(newest=wait)
        ends = any(report.asked_to_stop or report.in_a_row >= self._max_non_finite for report in reports)
        return reports + self._take(newest=True) if ends else reports

    def refuse(self, reports: Iterable[StepReport], *, last_step: int) -> None:
        """Raise NotFinite after max_non_finite steps of NaN or Inf in a row, or at the last step of all, after two."""
        for report in reports:
            is_last = report.step == last_step
            if report.in_a_row >= (min(DOUBTFUL, self._max_non_finite) if is_last else self._max_non_finite):
                why = "the last one" if is_last else f"training.max_non_finite is {self._max_non_finite}"
                remedy = "lower optimizer.lr, set optimizer.clip_norm, or use training.precision=fp32"
                if self._scaled and float(self.state.scale.value) <= 1:
                    remedy = "the gradient overflows float16 even at the least loss scale, 1: use training.precision=bf16"
                raise NotFinite(
                    f"loss or gradient has been NaN or Inf for {report.in_a_row} steps at step {report.step + 1} ({why}); {remedy}"
                )

    def metrics(self) -> dict[str, float]:
        """The metrics `train/skipped_steps`, their number so far, and, with a scaled loss, `train/loss_scale`."""
        scale = {"train/loss_scale": float(self.state.scale.value)} if self._scaled else {}
        return {"train/skipped_steps": float(self.state.skipped), **scale}

    @property
    def is_well(self) -> bool:
        """Whether the weights seem sound. One step of NaN moves no weights; two in a row may be caused by the weights."""
        return int(self.state.non_finite_in_a_row) < DOUBTFUL

    @property
    def last_non_finite(self) -> int:
        """The last step whose loss or gradient was NaN or Inf, -1 before any."""
        return int(self.state.last_non_finite)

    def _take(self, *, newest: bool) -> list[StepReport]:
        return [
            StepReport(step, loss + norm > 0, int(in_a_row), asked > 0)
            for step, (loss, norm, _, asked, in_a_row) in self._later.take(newest=newest)
        ]
