"""Which steps move the weights: not those whose loss or gradient is NaN or Inf, nor those far above what is usual.

The usual gradient norm is exp of a running mean of its logarithm, over steps that moved the weights or not. A fixed bound
that a run once exceeds skips every batch for ever; this one rises by skip_factor^(1 / 100) with each skipped step, so that
100 of them raise it tenfold if the factor is 10, and training goes on.

The same sum over the ranks carries what else they must agree on: the scale of a float16 loss, and whether one of them was
asked to stop.
"""

import math

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import NotFinite
from vaescale.training.strategies.base import Verdict

HORIZON_STEPS = 100
TRUSTED_AFTER_STEPS = 20
DOUBTFUL = 2
FIRST_SCALE, LARGEST_SCALE, GROWTH_STEPS = 2.0**16, 2.0**24, 2000  # of a float16 loss; torch.amp.GradScaler's
# What the state holds.
LOG_NORM, WEIGHT, SKIPPED, NON_FINITE_IN_A_ROW, LAST_NON_FINITE, SCALE, SINCE_SCALED = range(7)


class Guard:
    """Judges each step, the same way on every rank, and without the host waiting for the device."""

    def __init__(
        self,
        *,
        max_non_finite: int,
        device: torch.device,
        skip_factor: float | None = None,
        clip_norm: float | None = None,
        scaled: bool = False,
    ) -> None:
        """scaled: the loss is multiplied by `scale` before the backward pass, as float16 needs."""
        self._factor, self._clip_norm, self._most, self._scaled = (
            skip_factor,
            clip_norm,
            max_non_finite,
            scaled,
        )
        self.state = torch.zeros(7, dtype=torch.float64, device=device)
        self.state[LAST_NON_FINITE] = -1
        self.state[SCALE] = FIRST_SCALE if scaled else 1
        self._no, self._yes = (
            torch.full((1,), value, dtype=torch.float64, device=device) for value in (0, 1)
        )
        self._asked = _Later(device)

    def load(self, state: Tensor) -> None:
        """Go on with a saved state. Its scale counts only where there was one and is one: the precision may have changed."""
        scaled_before = float(state[SCALE]) != 1
        self.state = state.to(self.state)
        if not self._scaled:
            self.state[SCALE] = 1
        elif not scaled_before:
            self.state[SCALE] = FIRST_SCALE

    @property
    def scale(self) -> Tensor | None:
        """What a rank's loss is multiplied by before the backward pass, float32 []; None for nothing.

        The rank's loss is a mean over its own images: divided by the number of ranks, an image's gradient is as large as on
        one process, and overflows where it does there.
        """
        return (self.state[SCALE] / comm.world_size()).float() if self._scaled else None

    def judge(self, loss: Tensor, grad_norm: Tensor, *, step: int, asked_to_stop: bool = False) -> Verdict:
        """Whether and how far a step moves the weights. All ranks call it, once a step.

        loss [] is the rank's own, grad_norm [] the global gradient's before clipping, of the scaled loss.
        """
        scale = self.state[SCALE]
        divided_by = scale / comm.world_size() if self._scaled else scale
        norm = grad_norm.detach().double() / divided_by
        own_loss, own_norm = loss.detach().isfinite(), norm.isfinite()
        log_norm = torch.where(own_norm, norm.clamp_min(1e-300).log(), 0.0)
        faults = torch.stack([(~own_loss).double(), (~own_norm).double(), log_norm])
        sums = comm.all_reduce_sum(torch.cat([faults, self._yes if asked_to_stop else self._no]))
        self._asked.put(sums[3])
        finite, log_norm = (sums[0] == 0) & (sums[1] == 0), sums[2] / comm.world_size()
        # A gradient that overflows alone is no fault while there is scale to take away.
        overflows = (sums[0] == 0) & (sums[1] > 0) & (scale > 1) & self._scaled
        usual, weight, skipped, in_a_row, last, _, since = self.state
        middle, reach = usual / weight.clamp_min(1e-9), math.log(self._factor or math.inf)
        trusted = weight > 1 - (1 - 1 / HORIZON_STEPS) ** TRUSTED_AFTER_STEPS
        above = finite & trusted & (log_norm > middle + reach)
        # Neither a leap nor a gradient of zero moves the bound by more than one step's share of the reach.
        learned = torch.where(trusted, log_norm.clamp(middle - reach, middle + reach), log_norm)
        rate = torch.where(finite, 1 / HORIZON_STEPS, 0.0)
        skip = ~finite | above
        grows = finite & (since + 1 >= GROWTH_STEPS) & self._scaled
        next_scale = torch.where(overflows, scale / 2, torch.where(grows, 2 * scale, scale))
        self.state = torch.stack(
            [
                usual + rate * (learned - usual),
                weight + rate * (1 - weight),
                skipped + skip.double(),
                torch.where(finite, 0.0, torch.where(overflows, in_a_row, in_a_row + 1)),
                torch.where(finite | overflows, last, float(step)),
                next_scale.clamp(1, LARGEST_SCALE),
                torch.where(finite & ~grows, since + 1, 0.0),
            ]
        )
        clipped = (norm / self._clip_norm).clamp_min(1) if self._clip_norm else torch.ones_like(norm)
        # Where nothing moves, the gradient is divided by one: NaN would stay NaN, but Inf / Inf is another fault.
        divisor = torch.where(finite, clipped * divided_by, 1.0)
        return Verdict(norm.float(), divisor.float(), skip.float())

    def was_asked_to_stop(self) -> bool:
        """Whether some rank was asked to at the step before the last one: the same answer on all ranks at the same step."""
        return self._asked.get() > 0

    def metrics(self) -> dict[str, float]:
        """`train/skipped_steps`: how many so far. With a scaled loss also `train/loss_scale`."""
        scale = {"train/loss_scale": float(self.state[SCALE])} if self._scaled else {}
        return {"train/skipped_steps": float(self.state[SKIPPED]), **scale}

    @property
    def is_well(self) -> bool:
        """Whether the weights seem sound. One step of NaN has moved nothing; two in a row may be the weights' own doing."""
        return int(self.state[NON_FINITE_IN_A_ROW]) < DOUBTFUL

    @property
    def last_non_finite(self) -> int:
        """The last step whose loss or gradient was NaN or Inf, -1 if none was."""
        return int(self.state[LAST_NON_FINITE])

    def refuse(self, step: int, *, last: bool) -> None:
        """Raise NotFinite when too many steps in a row were NaN or Inf, or at the last step of all, two. On all ranks,
        as their states are one.
        """
        in_a_row = int(self.state[NON_FINITE_IN_A_ROW])
        if in_a_row >= self._most or (last and not self.is_well):
            why = "the last one" if last else f"training.max_non_finite is {self._most}"
            raise NotFinite(
                f"loss or gradient has been NaN or Inf for {in_a_row} steps at step {step} ({why}); lower "
                f"optimizer.lr, set optimizer.clip_norm, or use training.precision=fp32"
            )


class _Later:
    """A number on a device, read one step later, when it has long been there: reading it now would make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._slots = [torch.zeros((), dtype=torch.float64, pin_memory=self._on_gpu) for _ in range(2)]
        events = 2 if self._on_gpu else 0
        self._events = [torch.cuda.Event() for _ in range(events)]  # type: ignore[no-untyped-call]
        self._count = 0

    def put(self, value: Tensor) -> None:
        here = self._count % 2
        self._slots[here].copy_(value, non_blocking=True)
        if self._on_gpu:
            self._events[here].record()
        self._count += 1

    def get(self) -> float:
        """What was put in before the last one."""
        before = self._count % 2
        if self._on_gpu and self._count >= 2:
            self._events[before].synchronize()
        return float(self._slots[before])
