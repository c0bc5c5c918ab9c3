"""Stepwise expectation-maximization: an M step after every batch, so that one or two passes suffice. Cappe & Moulines 2009.

    s <- (1 - gamma_t) s + gamma_t s(batch t),        gamma_t = (t + 2)^-exponent        (Liang & Klein 2009, section 3.1)

s are the sums for the M step. Memory holds only a batch and K components, whatever the number of latents.

Products are in float32. Before and after each pass the mixture's density of some latents is computed in float64 too: where the two
differ, or the pass ends below the start, the pass is repeated in float64, which all later passes keep.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import comm
from vaescale.data.lookup import evenly
from vaescale.data.plan import Plan
from vaescale.mixtures.em import RESEEDED, Fit, no_report
from vaescale.mixtures.gaussian import Mixture, diagonals, moments
from vaescale.mixtures.points import Points
from vaescale.mixtures.steps import Frame, Steps, Sums, expectation, maximization

EXPONENT = 0.7
PROBED_SHARDS, PROBED = 64, 2048  # of all ranks, read once


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


class _State(NamedTuple):
    """The mixture after a step, its sums, and the number of components that were replaced."""

    mixture: Mixture
    sums: Sums
    reseeded: int


class _Check(NamedTuple):
    """nats: the mean log density (from moments: its bound) of the probed latents in float64. agrees: whether float32 agrees."""

    nats: float
    agrees: bool


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
    log density of each batch before its step. If the last pass ends below the start on the probed latents, the best mixture
    among the start and the ends of the passes is returned, with a note.
    """
    plan = Plan(latents.shard_samples, min(batch, latents.count), seed)
    frame, probe, dtype = _frame_of(start), _probe(latents), torch.float32
    state, history = _State(start, _sums_of(start, frame), 0), list[float]()
    check = at_start = _check(probe, start, frame)
    best, best_nats, passed = state, at_start.nats, 0
    for number in range(passes):
        if not check.agrees:
            dtype = torch.float64
        end, values = _pass(latents, state, plan, number, frame, ridge, dtype, report)
        check = _check(probe, end.mixture, frame)
        if dtype == torch.float32 and not (check.agrees and check.nats >= at_start.nats):
            dtype = torch.float64
            end, values = _pass(latents, state, plan, number, frame, ridge, dtype, report)
            check = _check(probe, end.mixture, frame)
        state, history = end, history + values
        if check.nats > best_nats:
            best, best_nats, passed = end, check.nats, number + 1
    if check.nats >= at_start.nats:
        return Fit(state.mixture, history, False, state.reseeded)
    note = (
        f"stepwise EM ended at {check.nats:.3f} nats, below its start at {at_start.nats:.3f}; the mixture is that "
        f"{f'after pass {passed}' if passed else 'of the start'}, take EM without --online, or a larger --online-batch"
    )
    return Fit(best.mixture, history[: passed * plan.steps_per_epoch], False, best.reseeded, note)


def _pass(
    latents: Takes,
    state: _State,
    plan: Plan,
    number: int,
    frame: Frame,
    ridge: float | Tensor,
    dtype: torch.dtype,
    report: Callable[[int, float], None],
) -> tuple[_State, list[float]]:
    """One pass, from a state: the state after it, and the mean log density of each batch before its step."""
    # Neighbouring slots, so that a rank reads from few shards.
    slots = np.array_split(np.arange(plan.global_batch), comm.world_size())[comm.rank()]
    (mixture, sums, reseeded), values = state, list[float]()
    kind = mixture.kind
    for step in range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch):
        points = Points(*latents.take(plan.samples(step, slots)))
        value, new_sums = expectation(points, mixture, frame, dtype)
        gamma = (step + 2) ** -EXPONENT
        sums = Sums(*((1 - gamma) * old + gamma * new for old, new in zip(sums, new_sums, strict=True)))
        reseed = reseeded < RESEEDED * len(mixture.weights)
        mixture, empty = maximization(sums, frame, kind, ridge, latents.count, reseed=reseed)
        reseeded += empty
        if empty:
            sums = _sums_of(mixture, frame)
        values.append(value)
        report(step + 1, value)
    return _State(mixture, sums, reseeded), values


def _probe(latents: Takes) -> Points:
    """Evenly spaced latents of evenly spaced shards, of which each rank has its share."""
    samples = latents.shard_samples
    starts = np.cumsum(samples) - samples
    shards = evenly(len(samples), PROBED_SHARDS).numpy()
    each = max(1, PROBED // len(shards))
    numbers = np.concatenate([starts[shard] + evenly(int(samples[shard]), each).numpy() for shard in shards])
    return Points(*latents.take(np.array_split(numbers, comm.world_size())[comm.rank()]))


def _check(probe: Points, mixture: Mixture, frame: Frame) -> _Check:
    """Compare float32 with float64 on all probed latents."""
    *_, agrees = Steps(probe, frame, mixture.kind, torch.float32, probed=probe.count).expectation(mixture)
    nats, _ = expectation(probe, mixture, frame)
    return _Check(nats, agrees)


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
