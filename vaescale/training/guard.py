"""The guard of a training step: it decides on the device, equally on all ranks, whether the step moves the weights.

A step whose loss or gradient is NaN or Inf on any rank moves no weights on any rank. Neither does a step whose gradient norm
is far above the usual one (`outliers.py`), nor one whose float16 gradient overflows (`loss_scale.py`). One all-reduce per step
decides this, and carries whether a rank was asked to stop. The host reads the outcome one step later (`later.py`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import NotFinite
from vaescale.training.later import Later
from vaescale.training.loss_scale import FIRST_SCALE, LossScale
from vaescale.training.outliers import UsualNorm
from vaescale.training.strategies.base import Verdict

DOUBTFUL = 2  # steps of NaN in a row, after which the weights themselves may be the cause


class GuardState(NamedTuple):
    """The guard's statistics of the steps so far: float64 [] each, on the device.

    last_non_finite: the last step whose loss or gradient was NaN or Inf, -1 before any. Checkpoints hold the seven numbers as
    one tensor in this order.
    """

    usual: UsualNorm
    skipped: Tensor
    non_finite_in_a_row: Tensor
    last_non_finite: Tensor
    scale: LossScale

    @classmethod
    def first(cls, *, scaled: bool, device: torch.device) -> "GuardState":
        """The state before the first step."""
        scale = FIRST_SCALE if scaled else 1.0
        numbers = torch.tensor([0, 0, 0, 0, -1, scale, 0], dtype=torch.float64, device=device)
        return cls.from_tensor(numbers)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> "GuardState":
        """Rebuild the state from the tensor of `to_tensor`, float64 [7]."""
        log_norm, weight, skipped, in_a_row, last, scale, finite_steps = numbers.unbind()
        return cls(UsualNorm(log_norm, weight), skipped, in_a_row, last, LossScale(scale, finite_steps))

    def to_tensor(self) -> Tensor:
        """All numbers in the order of the fields, float64 [7]."""
        faults = (self.skipped, self.non_finite_in_a_row, self.last_non_finite)
        return torch.stack([*self.usual, *faults, *self.scale])


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
        clip_norm: float | None = None,
        scaled: bool = False,
    ) -> None:
        """Create a guard. scaled: whether the loss is multiplied by `scale` before the backward pass, as float16 needs."""
        self._factor, self._clip_norm, self._scaled = skip_factor, clip_norm, scaled
        self._max_non_finite = max_non_finite
        self.state = GuardState.first(scaled=scaled, device=device)
        self._no, self._yes = (
            torch.full((1,), value, dtype=torch.float64, device=device) for value in (0, 1)
        )
        self._later = Later(len(StepReport._fields) - 1, device)

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
        self.state = state
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
        state = self.state
        divided_by = state.scale.value / comm.world_size() if self._scaled else state.scale.value
        norm = grad_norm.detach().double() / divided_by
        log_norm = torch.where(norm.isfinite(), norm.clamp_min(1e-300).log(), 0.0)
        faults = torch.stack([(~loss.detach().isfinite()).double(), (~norm.isfinite()).double(), log_norm])
        sums = comm.all_reduce_sum(torch.cat([faults, self._yes if asked_to_stop else self._no]))
        loss_is_finite, norm_is_finite, log_norm = sums[0] == 0, sums[1] == 0, sums[2] / comm.world_size()
        finite = loss_is_finite & norm_is_finite
        explained = state.scale.explains(loss_is_finite=loss_is_finite, norm_is_finite=norm_is_finite)
        overflows = explained & self._scaled
        skip = ~finite | state.usual.is_exceeded(log_norm, factor=self._factor)
        non_finite = ~finite & ~overflows
        in_a_row = torch.where(
            finite, 0.0, torch.where(overflows, state.non_finite_in_a_row, state.non_finite_in_a_row + 1)
        )
        self.state = GuardState(
            usual=state.usual.followed_by(log_norm, finite=finite, factor=self._factor),
            skipped=state.skipped + skip.double(),
            non_finite_in_a_row=in_a_row,
            last_non_finite=torch.where(non_finite, float(step), state.last_non_finite),
            scale=state.scale.followed_by(finite=finite, overflows=overflows, grows=self._scaled),
        )
        self._later.put(step, torch.stack([non_finite.double(), in_a_row, sums[3]]))
        clipped = (norm / self._clip_norm).clamp_min(1) if self._clip_norm else torch.ones_like(norm)
        # Where no weights move, the gradient is divided by one: NaN would stay NaN, but Inf / Inf would be another fault.
        divisor = torch.where(finite, clipped * divided_by, 1.0)
        return Verdict(norm.float(), divisor.float(), skip.float())

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
                raise NotFinite(
                    f"loss or gradient has been NaN or Inf for {report.in_a_row} steps at step {report.step + 1} ({why}); "
                    f"lower optimizer.lr, set optimizer.clip_norm, or use training.precision=fp32"
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
            StepReport(step, non_finite > 0, int(in_a_row), asked > 0)
            for step, (non_finite, in_a_row, asked) in self._later.take(newest=newest)
        ]
