"""Expectation-maximization from a first mixture to convergence. Dempster, Laird & Rubin 1977."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale.mixtures.gaussian import Mixture
from vaescale.mixtures.steps import AGREES_NATS, Latents, Steps, maximization, standardize

RESEEDED = 3  # empty components are replaced at most 3 K times


class Fit(NamedTuple):
    """A fitted mixture and its history.

    history: the mean log density (from moments: its bound) in nats before each M step; after convergence the last entry is
    that of the mixture. note: a sentence for the user where the mixture is not that of the last step; else empty.
    """

    mixture: Mixture
    history: list[float]
    converged: bool
    reseeded: int
    note: str = ""


def no_report(_iteration: int, _nats: float) -> None:
    """Ignore the progress of a fit: the default of `report`."""


def fit(
    latents: Latents,
    start: Mixture,
    *,
    ridge: float | Tensor = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    dtype: torch.dtype = torch.float32,
    report: Callable[[int, float], None] = no_report,
) -> Fit:
    """Iterate from `start` until a step improves the mean log density by less than `tolerance` nats.

    ridge: a number or [Z] to add to the covariances' diagonals. dtype: precision of the products; where float32 is too coarse
    (narrow components far apart) according to some latents' densities at each iteration, the fit continues in float64. report:
    called with the number and the mean log density of each iteration. The result does not depend on the number of ranks, up to
    rounding.
    """
    frame, reseeded = standardize(latents, start.kind), 0
    steps = Steps(latents, frame, start.kind, dtype)
    mixture, history = start, list[float]()
    rested = False  # whether the step before replaced no empty component
    for _ in range(max_iterations):
        value, sums, agrees = steps.expectation(mixture)
        switched = dtype == torch.float32 and (
            not agrees or not math.isfinite(value) or (rested and value < history[-1] - AGREES_NATS)
        )
        if switched:  # before the density is reported: float32 may be thousands of nats off
            dtype = torch.float64
            steps = Steps(latents, frame, start.kind, dtype)
            value, sums, _ = steps.expectation(mixture)
        converged = rested and not switched and abs(value - history[-1]) < tolerance
        history.append(value)
        report(len(history), value)
        if converged:
            return Fit(mixture, history, True, reseeded)
        # With fewer distinct latents than components, some components stay empty.
        reseed = reseeded < RESEEDED * len(start.weights)
        mixture, empty = maximization(sums, frame, start.kind, ridge, latents.count, reseed=reseed)
        rested, reseeded = empty == 0 and not switched, reseeded + empty
    if dtype == torch.float32 and not steps.expectation(mixture)[2]:
        return fit(
            latents,
            start,
            ridge=ridge,
            tolerance=tolerance,
            max_iterations=max_iterations,
            dtype=torch.float64,
            report=report,
        )
    return Fit(mixture, history, False, reseeded)
