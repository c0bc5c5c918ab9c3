"""Which steps move the weights: not those whose loss or gradient is NaN or Inf, nor those far above what is usual.

The usual gradient norm is exp of a running mean of its logarithm, over steps that moved the weights or not. A fixed bound
that a run once exceeds skips every batch for ever; this one rises by skip_factor^(1 / 100) with each skipped step, so that
100 of them raise it tenfold if the factor is 10, and training goes on.
"""

import math

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import TrainingStopped

HORIZON_STEPS = 100
TRUSTED_AFTER_STEPS = 20
DOUBTFUL = 2
# What the state holds.
LOG_NORM, WEIGHT, SKIPPED, NON_FINITE_IN_A_ROW = range(4)


class Guard:
    """Judges each step, the same way on every rank, and without the host waiting for the device."""

    def __init__(self, *, skip_factor: float | None, max_non_finite: int, device: torch.device) -> None:
        self._factor, self._most = skip_factor, max_non_finite
        self.state = torch.zeros(4, dtype=torch.float64, device=device)

    def skips(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this step must not move the weights, else 0.0; float32 []. All ranks call it, once a step.

        loss [] is the rank's own, grad_norm [] the global gradient's, before clipping.
        """
        norm = grad_norm.detach().double()
        finite = norm.isfinite() & loss.detach().isfinite()
        log_norm = torch.where(finite, norm.clamp_min(1e-300).log(), 0.0)
        sums = comm.all_reduce_sum(torch.stack([(~finite).double(), log_norm]))
        finite, log_norm = sums[0] == 0, sums[1] / comm.world_size()
        usual, weight, skipped, in_a_row = self.state
        middle, reach = usual / weight.clamp_min(1e-9), math.log(self._factor or math.inf)
        trusted = weight > 1 - (1 - 1 / HORIZON_STEPS) ** TRUSTED_AFTER_STEPS
        above = finite & trusted & (log_norm > middle + reach)
        # Neither a leap nor a gradient of zero moves the bound by more than one step's share of the reach.
        learned = torch.where(trusted, log_norm.clamp(middle - reach, middle + reach), log_norm)
        rate = torch.where(finite, 1 / HORIZON_STEPS, 0.0)
        skip = ~finite | above
        self.state = torch.stack(
            [
                usual + rate * (learned - usual),
                weight + rate * (1 - weight),
                skipped + skip.double(),
                torch.where(finite, 0.0, in_a_row + 1),
            ]
        )
        moved_nothing: Tensor = skip.float()
        return moved_nothing

    def metrics(self) -> dict[str, float]:
        """`train/skipped_steps`: how many so far."""
        return {"train/skipped_steps": float(self.state[SKIPPED])}

    @property
    def is_well(self) -> bool:
        """Whether the weights seem sound. One step of NaN has moved nothing; two in a row may be the weights' own doing."""
        return int(self.state[NON_FINITE_IN_A_ROW]) < DOUBTFUL

    def refuse(self, step: int, *, last: bool) -> None:
        """Raise TrainingStopped when too many steps in a row were NaN or Inf, or at the last step of all, two. On all ranks,
        as their states are one.
        """
        in_a_row = int(self.state[NON_FINITE_IN_A_ROW])
        if in_a_row >= self._most or (last and not self.is_well):
            why = "the last one" if last else f"training.max_non_finite is {self._most}"
            raise TrainingStopped(
                f"loss or gradient has been NaN or Inf for {in_a_row} steps at step {step} ({why}); lower "
                f"optimizer.lr, set optimizer.clip_norm, or use training.precision=fp32"
            )
