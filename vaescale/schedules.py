"""Values that change over training, as pure functions of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

from pydantic import Field, model_validator

from vaescale.config import Config


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up to 1, then half a cosine down to `final_fraction`. Loshchilov & Hutter 2017, eq. 5.

    step: the optimizer step about to be taken, from 0. The first step has 1/warmup_steps (or 1), the last one
    (total_steps - 1) has `final_fraction`, unless it is the only one.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    last = total_steps - 1
    progress = (step - warmup_steps) / (last - warmup_steps) if warmup_steps < last else float(last > 0)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def constant(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:  # noqa: ARG001
    """Linear warm-up to 1, then 1. Takes what every schedule takes."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


SCHEDULES = {
    "cosine": warmup_cosine,
    "constant": constant,
    "plateau": constant,
}  # its factor: training/improvement.py

SIGMOID_REACH = 6.0  # the sigmoid runs from -6 to 6


class Annealing(Config):
    """A value that goes from `start` to `end` in `steps` steps and stays there."""

    schedule: Literal["linear", "cosine", "sigmoid", "cyclical"] = Field(
        description="shape of the way from start to end"
    )
    start: float = Field(default=0.0, ge=0, description="value at the first step")
    end: float = Field(default=1.0, ge=0, description="value from step `steps` on")
    steps: int = Field(gt=0, description="the first step with the value `end`; of all cycles together")
    cycles: int | None = Field(
        default=None, gt=0, description="number of cycles of a cyclical schedule; null: 4"
    )
    rising: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of each cycle that rises, in a cyclical schedule; null: 0.5",
    )

    @model_validator(mode="after")
    def _cycles_belong_to_cyclical(self) -> "Annealing":
        for name in ("cycles", "rising"):
            if getattr(self, name) is not None and self.schedule != "cyclical":
                raise ValueError(
                    f"{name} (={getattr(self, name)}) belongs to `schedule: cyclical`, this is {self.schedule}"
                )
        return self


def annealed(value: float | Annealing, step: int) -> float:
    """The value at an optimizer step, counted from 0.

    linear: Sonderby et al. 2016. sigmoid: Bowman et al. 2016, cut at -6 and 6 and stretched to reach both ends. cyclical:
    `cycles` times up and held, Fu et al. 2019, eq. 6. cosine: half a cosine.
    """
    if not isinstance(value, Annealing):
        return value
    progress = min(1.0, step / value.steps)
    return value.start + (value.end - value.start) * _risen(value, progress)


def _risen(value: Annealing, progress: float) -> float:
    """The part of the way from `start` to `end`, from progress in [0, 1]."""
    if value.schedule == "linear" or progress >= 1:
        return progress
    if value.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * progress))
    if value.schedule == "sigmoid":
        low = _sigmoid(-SIGMOID_REACH)
        return (_sigmoid(SIGMOID_REACH * (2 * progress - 1)) - low) / (1 - 2 * low)
    within = progress * (value.cycles or 4) % 1
    return min(1.0, within / (value.rising or 0.5))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
