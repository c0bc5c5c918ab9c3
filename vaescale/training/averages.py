"""Averages of the weights over the steps of training, and the average of another length put together from saved ones.

An average moves by w_t of the way to the weights after step t, counted from 0. It is therefore a sum of the weights after each
step, and of the initial ones, with factors that w_0, w_1, ... give: its profile.

    exponential      w_t = 1 - min(decay, (1 + t) / (10 + t)), with warm-up. Polyak & Juditsky 1992.
    power function   w_t = 1 - (1 - 1 / (t + 1))^(gamma + 1): a fixed share of training so far. Karras et al. 2024, section 3.1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.training.config import MOST_SIGMA_REL, TrainingConfig

MAIN = "ema"


class Average(NamedTuple):
    """How an average moves. Of the two numbers, an exponential one has a decay, a power function a gamma."""

    decay: float | None = None
    warmup: bool = True
    gamma: float | None = None

    def weight(self, step: int) -> float:
        """The share w_t by which the average moves to the weights after step t, in (0, 1]."""
        return float(self.weights(np.array([step]))[0])

    def weights(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """`weight` of several steps."""
        t = at.astype(np.float64)
        if self.gamma is not None:
            return 1 - (1 - 1 / (t + 1)) ** (self.gamma + 1)
        assert self.decay is not None
        return 1 - np.minimum(self.decay, (1 + t) / (10 + t) if self.warmup else np.ones_like(t))

    def profile(self, steps: int) -> NDArray[np.float64]:
        """The factors of the initial weights and of those after each of the first steps, [steps + 1]; their sum is 1."""
        moves = self.weights(np.arange(steps))
        with np.errstate(divide="ignore"):
            kept = np.concatenate(
                [np.cumsum(np.log1p(-moves)[::-1])[::-1], [0.0]]
            )  # log of what later steps keep
        factors: NDArray[np.float64] = np.concatenate([[1.0], moves]) * np.exp(kept)
        return factors


def averages_of(config: TrainingConfig) -> dict[str, Average]:
    """The averages that a recipe asks for, by the name of their file in a checkpoint: `ema`, ema-0.9999, ema-sigma-0.05."""
    main = {MAIN: Average(config.ema_decay, config.ema_warmup)} if config.ema_decay else {}
    return (
        main
        | {name_of(decay, None): Average(decay, config.ema_warmup) for decay in config.ema_more}
        | {name_of(None, sigma): Average(gamma=gamma_of(sigma)) for sigma in config.ema_sigma_rel}
    )


def name_of(decay: float | None, sigma_rel: float | None) -> str:
    """The name of an average beside the main one."""
    return f"{MAIN}-{decay}" if sigma_rel is None else f"{MAIN}-sigma-{sigma_rel}"


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power function whose standard deviation is this share of training. Karras et al. 2024, eq. 7 and 8.

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), in (0, 0.2887).
    """
    low, high = 0.0, 1.0

    def share(gamma: float) -> float:
        return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))

    if not 0 < sigma_rel < MOST_SIGMA_REL:
        raise ValueError(f"sigma_rel (={sigma_rel}) must be above 0 and below {MOST_SIGMA_REL}")
    while share(high) > sigma_rel:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > sigma_rel else (low, middle)
    return high


class Mixed(NamedTuple):
    """Factors of saved averages whose sum comes nearest to a wished one. error: the distance of the profiles, relative to the wished."""

    factors: NDArray[np.float64]
    error: float


def mix(saved: Sequence[tuple[int, Average]], wished: tuple[int, Average]) -> Mixed:
    """The factors of saved averages, each (steps, average), that approximate a wished one by least squares of their profiles.

    Karras et al. 2024, section 3.2, with the profiles of the steps themselves in place of their integrals. The factors sum to 1.
    Raises ValueError where a saved average is of a later step than the wished one.
    """
    steps = wished[0]
    if any(step > steps for step, _ in saved):
        raise ValueError(f"an average of a step after {steps} holds weights that the wished one does not")
    profiles = np.zeros((len(saved), steps + 1))
    for row, (step, average) in zip(profiles, saved, strict=True):
        row[: step + 1] = average.profile(step)
    target = wished[1].profile(steps)
    # The last equation is the sum of the factors, which is 1 exactly: they are solved for as differences from the newest.
    base = profiles[-1]
    differences = (profiles[:-1] - base).T
    solved, *_ = np.linalg.lstsq(differences, target - base, rcond=1e-10)
    factors = np.concatenate([solved, [1 - solved.sum()]])
    error = np.linalg.norm(factors @ profiles - target) / np.linalg.norm(target)
    return Mixed(factors, float(error))
