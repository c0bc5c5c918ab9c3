"""Values that change over training, as pure functions of the step: nothing to save, nothing to restore."""

import math


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up to 1, then half a cosine down to `final_fraction`. Loshchilov & Hutter 2017, eq. 5.

    step: the optimizer step about to be taken, from 0. The first step has 1/warmup_steps (or 1), the last one
    (total_steps - 1) has `final_fraction`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def constant(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:  # noqa: ARG001
    """Linear warm-up to 1, then 1. Takes what every schedule takes."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


SCHEDULES = {"cosine": warmup_cosine, "constant": constant}
