"""Expectation-maximization, from a start until a step gains little. Dempster, Laird & Rubin 1977."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale.mixtures.gaussian import Mixture
from vaescale.mixtures.steps import AGREES_NATS, Latents, Steps, maximization, standardize

RESEEDED = 3  # times the number of components, at most


class Fit(NamedTuple):
    """history: the mean log density (from moments: its bound) in nats before each M step; if it converged, the last one is the
    mixture's own.
    """

    mixture: Mixture
    history: list[float]
    converged: bool
    reseeded: int


def untold(_iteration: int, _nats: float) -> None:
    """Nobody is told how a fit gets on."""


def fit(
    latents: Latents,
    start: Mixture,
    *,
    ridge: float | Tensor = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    dtype: torch.dtype = torch.float32,
    tell: Callable[[int, float], None] = untold,
) -> Fit:
    """Iterate from `start` until a step gains less than `tolerance` nats a latent.

    ridge: added to the covariances' diagonals, one number or [Z]. dtype: of the products; where float32 turns out too
    coarse (narrow components far apart), the fit goes on in float64. tell: of each iteration's number and mean log density. The
    result is the same at every number of ranks, to rounding.
    """
    frame, reseeded = standardize(latents, start.kind), 0
    steps = Steps(latents, frame, start.kind, dtype)
    mixture, history = start, list[float]()
    rested = False  # whether no component was given away in the step before
    for _ in range(max_iterations):
        value, sums = steps.expectation(mixture)
        switched = False
        coarse = dtype == torch.float32 and (
            not math.isfinite(value) or (rested and value < history[-1] - AGREES_NATS)
        )
        converged = rested and not coarse and abs(value - history[-1]) < tolerance
        if coarse or (converged and dtype == torch.float32 and not steps.agrees(mixture)):
            dtype = torch.float64
            steps = Steps(latents, frame, start.kind, dtype)
            value, sums = steps.expectation(mixture)
            converged, switched = False, True
        history.append(value)
        tell(len(history), value)
        if converged:
            return Fit(mixture, history, True, reseeded)
        # Where there are fewer distinct latents than components some stay empty.
        reseed = reseeded < RESEEDED * len(start.weights)
        mixture, empty = maximization(sums, frame, start.kind, ridge, latents.count, reseed=reseed)
        rested, reseeded = empty == 0 and not switched, reseeded + empty
    if dtype == torch.float32 and not steps.agrees(mixture):
        return fit(
            latents,
            start,
            ridge=ridge,
            tolerance=tolerance,
            max_iterations=max_iterations,
            dtype=torch.float64,
            tell=tell,
        )
    return Fit(mixture, history, False, reseeded)
