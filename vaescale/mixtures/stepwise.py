"""Stepwise expectation-maximization: the mixture moves after every batch, so that a pass or two suffice. Cappe & Moulines 2009.

    s <- (1 - gamma_t) s + gamma_t s(batch t),        gamma_t = (t + 2)^-exponent        (Liang & Klein 2009, section 3.1)

s are the sums that the M step takes. Only a batch and K components are in memory, whatever the number of latents.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import comm
from vaescale.data.plan import Plan
from vaescale.mixtures.em import RESEEDED, Fit, untold
from vaescale.mixtures.gaussian import Mixture, diagonals, moments
from vaescale.mixtures.points import Points
from vaescale.mixtures.steps import Frame, Sums, expectation, maximization

EXPONENT = 0.7


class Takes(Protocol):
    """Latents of which any can be had. size: Z. count: of all. shard_samples: of each shard, whose order is shuffled first."""

    size: int
    count: int

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Latents of each shard."""
        ...

    def take(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Those with these numbers, for this rank alone."""
        ...


def fit_stepwise(
    latents: Takes,
    start: Mixture,
    *,
    batch: int,
    passes: int,
    seed: int,
    ridge: float | Tensor = 1e-6,
    tell: Callable[[int, float], None] = untold,
) -> Fit:
    """Pass over the latents in a random order.

    batch: latents of a step, over all ranks; the result is the same at every number of ranks, to rounding.
    tell: of each step's number, from 1, and mean log density.
    The history of what is returned is the mean log density of each step's batch, before it.
    """
    batch = min(batch, latents.count)
    plan = Plan(latents.shard_samples, batch, seed)
    # Neighbouring slots, which lie in few shards.
    slots = np.array_split(np.arange(batch), comm.world_size())[comm.rank()]
    frame = _frame_of(start)
    mixture, sums, steps = start, _sums_of(start, frame), passes * plan.steps_per_epoch
    history, reseeded = list[float](), 0
    for step in range(steps):
        points = Points(*latents.take(plan.samples(step, slots)))
        value, own = expectation(points, mixture, frame, torch.float32)
        gamma = (step + 2) ** -EXPONENT
        sums = Sums(*((1 - gamma) * old + gamma * new for old, new in zip(sums, own, strict=True)))
        reseed = reseeded < RESEEDED * len(start.weights)
        mixture, empty = maximization(sums, frame, start.kind, ridge, latents.count, reseed=reseed)
        reseeded += empty
        if empty:
            sums = _sums_of(mixture, frame)
        history.append(value)
        tell(step + 1, value)
    return Fit(mixture, history, False, reseeded)


def _frame_of(mixture: Mixture) -> Frame:
    """Shifted and scaled, latent by latent, to what the mixture says: a look at all latents would be a pass of its own."""
    mean, covariance = moments(mixture)
    return Frame(mean, torch.diag(covariance.diagonal().sqrt()))


def _sums_of(mixture: Mixture, frame: Frame) -> Sums:
    """The sums that the M step would make this mixture of."""
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
