"""Fit mixtures to latents, by EM in memory or by stepwise EM over shards, with progress on stderr."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vaescale import comm
from vaescale.aggregate.latents import ShardLatents
from vaescale.mixtures import em, selection
from vaescale.mixtures.gaussian import Kind, Mixture
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import Candidate, Spread
from vaescale.mixtures.starts import Start
from vaescale.mixtures.stepwise import fit_stepwise
from vaescale.system import heartbeat
from vaescale.system.console import Progress, say


class Fitting(NamedTuple):
    """Options for fitting a mixture.

    covariance, ridge: form of the covariances, and the multiple of each latent's variance to add to their diagonals. start,
    restarts, seed: initialization of EM, number of starts of which the best fit is kept, and random seed. tolerance (nats),
    max_iterations: end of EM. online: number of passes of stepwise EM with batches of `online_batch` latents, in place of EM.
    """

    covariance: Kind
    start: Start
    restarts: int
    tolerance: float
    max_iterations: int
    ridge: float
    online: int | None
    online_batch: int
    seed: int


class Material(NamedTuple):
    """The latents of a run: `train` for the fit, draws of the training and held-out images for densities, and the spread.

    images: number of training images. draws: number of draws of each image, 0 for moments. data_hash: hash of the training
    images.
    """

    train: Points | ShardLatents
    drawn: Points | ShardLatents
    val: Points | ShardLatents
    spread: Spread
    images: int
    draws: int
    data_hash: str


def fit_candidate(material: Material, number: int, how: Fitting) -> Candidate:
    """The best fit of `number` components. All ranks call it."""
    components = f"{number} component{'s' if number > 1 else ''}"
    heartbeat.beat(f"fitting {components}")
    train, ridge = material.train, how.ridge * material.spread.total.clamp_min(1e-12)
    if comm.is_main():
        say(f"fitting {components} to {train.count} latents of {train.size} values")

    def fit(start: Mixture) -> em.Fit:
        with Progress(f"fit {components}", 0, unit="iterations", shown=comm.is_main()) as progress:
            done = _fit(train, start, ridge, how, lambda i, nats: progress.update(i, f"{nats:.3f} nats"))
        if comm.is_main() and done.note:
            say(f"{components}: {done.note}")
        return done

    candidate = selection.candidate(
        train,
        material.drawn,
        material.val,
        number,
        fit=fit,
        restarts=how.restarts,
        images=material.images,
        kind=how.covariance,
        how=how.start,
        seed=how.seed,
        ridge=ridge,
    )
    if comm.is_main() and not candidate.converged and how.online is None:
        say(
            f"{number} components: not converged after {candidate.iterations} iterations; raise --max-iterations"
        )
    return candidate


def _fit(
    train: Points | ShardLatents,
    start: Mixture,
    ridge: Tensor,
    how: Fitting,
    report: Callable[[int, float], None],
) -> em.Fit:
    if isinstance(train, ShardLatents) and how.online is not None:
        return fit_stepwise(
            train,
            start,
            batch=how.online_batch,
            passes=how.online,
            seed=how.seed,
            ridge=ridge,
            report=report,
        )
    return em.fit(
        train,
        start,
        ridge=ridge,
        tolerance=how.tolerance,
        max_iterations=how.max_iterations,
        report=report,
    )
