"""Stepwise expectation-maximization: an M step after every batch, so that one or two passes suffice. Cappe & Moulines 2009.

    s <- (1 - gamma_t) s + gamma_t s(batch t),        gamma_t = (t + 2)^-exponent        (Liang & Klein 2009, section 3.1)

s are the sums for the M step. Memory holds only a batch and K components, whatever the number of latents.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import comm
from vaescale.data.plan import Plan
from vaescale.mixtures.em import RESEEDED, Fit, no_report
from vaescale.mixtures.gaussian import Mixture, diagonals, moments
from vaescale.mixtures.points import Points
from vaescale.mixtures.steps import Frame, Sums, expectation, maximization

EXPONENT = 0.7


class Takes(Protocol):
    """Latents with access by number. size: Z. count: number of latents. shard_samples: number of latents in each shard."""

    size: int
    count: int

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """The number of latents in each shard, whose order is shuffled first."""
        ...

    def take(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """The latents with these numbers, for this rank only, and their variances in the case of moments."""
        ...


def fit_stepwise(
    latents: Takes,
    start: Mixture,
    *,
    batch: int,
    passes: int,
    seed: int,
    ridge: float | Tensor = 1e-6,
    report: Callable[[int, float], None] = no_report,
) -> Fit:
    """Fit a mixture in passes over the latents, in random order.

    batch: number of latents of a step, over all ranks; the result does not depend on the number of ranks, up to rounding.
    report: called with the number, from 1, and the mean log density of each step. The history of the returned fit is the mean
    log density of each batch before its step.
    """
    batch = min(batch, latents.count)
    plan = Plan(latents.shard_samples, batch, seed)
    # Neighbouring slots, so that a rank reads from few shards.
    slots = np.array_split(np.arange(batch), comm.world_size())[comm.rank()]
    frame = _frame_of(start)
    mixture, sums, steps = start, _sums_of(start, frame), passes * plan.steps_per_epoch
    history, reseeded = list[float](), 0
    for step in range(steps):
        points = Points(*latents.take(plan.samples(step, slots)))
        value, new_sums = expectation(points, mixture, frame, torch.float32)
        gamma = (step + 2) ** -EXPONENT
        sums = Sums(*((1 - gamma) * old + gamma * new for old, new in zip(sums, new_sums, strict=True)))
        reseed = reseeded < RESEEDED * len(start.weights)
        mixture, empty = maximization(sums, frame, start.kind, ridge, latents.count, reseed=reseed)
        reseeded += empty
        if empty:
            sums = _sums_of(mixture, frame)
        history.append(value)
        report(step + 1, value)
    return Fit(mixture, history, False, reseeded)


def _frame_of(mixture: Mixture) -> Frame:
    """The diagonal frame of the mixture's mean and variances. The frame of all latents would need one more pass."""
    mean, covariance = moments(mixture)
    return Frame(mean, torch.diag(covariance.diagonal().sqrt()))


def _sums_of(mixture: Mixture, frame: Frame) -> Sums:
    """The sums whose M step returns this mixture."""
    weights, means, covariances = mixture.weights, frame.inward(mixture.means), mixture.covariances
    firsts = weights[:, None] * means
    inverse = frame.inverse
    if mixture.kind in ("full", "tied"):
        covariances = inverse @ covariances @ inverse.mT
    if mixture.kind == "full":
        seconds = weights[:, None, None] * (covariances + means[:, :, None] * means[:, None])
    elif mixture.kind == "tied":
        seconds = covariances + firsts.T @ means
    else:
        seconds = weights[:, None] * (diagonals(mixture) * inverse.diagonal().square() + means.square())
    return Sums(weights, firsts, seconds)
