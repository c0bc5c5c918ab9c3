"""Expectation-maximization, from a start until a step gains little. Dempster, Laird & Rubin 1977."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale.mixtures.gaussian import Mixture
from vaescale.mixtures.steps import AGREES_NATS, Latents, Steps, maximization, standardize


class Fit(NamedTuple):
    """history: the mean log density (from moments: its bound) in nats before each M step, the last one the mixture's own."""

    mixture: Mixture
    history: list[float]
    converged: bool
    reseeded: int


def fit(
    latents: Latents,
    start: Mixture,
    *,
    ridge: float | Tensor = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    dtype: torch.dtype = torch.float32,
) -> Fit:
    """Iterate from `start` until a step gains less than `tolerance` nats a latent.

    ridge: added to the covariances' diagonals, one number or [Z]. dtype: of the products; where float32 turns out too
    coarse (narrow components far apart), the fit goes on in float64. The result is the same at every number of ranks, to
    rounding.
    """
    frame, reseeded = standardize(latents, start.kind), 0
    steps = Steps(latents, frame, start.kind, dtype)
    mixture, history = start, list[float]()
    rested = False  # whether no component was given away in the step before
    for _ in range(max_iterations):
        value, sums = steps.expectation(mixture)
        coarse = dtype == torch.float32 and (
            not math.isfinite(value) or (rested and value < history[-1] - AGREES_NATS)
        )
        converged = rested and not coarse and value - history[-1] < tolerance
        if coarse or (converged and dtype == torch.float32 and not steps.agrees(mixture)):
            dtype = torch.float64
            steps = Steps(latents, frame, start.kind, dtype)
            value, sums = steps.expectation(mixture)
            converged = False
        history.append(value)
        if converged:
            return Fit(mixture, history, True, reseeded)
        mixture, empty = maximization(sums, frame, start.kind, ridge, latents.count)
        rested, reseeded = empty == 0, reseeded + empty
    return Fit(mixture, history, False, reseeded)
