"""Log density of draws of q(z|x) under a Gaussian mixture that was fitted to the q(z|x) of other images.

A mixture r(z) of other images bounds the information without a limit of ln N, because E[log q(z|x) - log r(z)] = I(x; z) +
KL(q(z)||r(z)) for every r that does not depend on the draws (Barber & Agakov 2003; Poole et al. 2019, eq. 2). The images are
halved at random, and the draws of each half are measured under the mixture of the other half.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.aggregate.densities import QUIET_SECONDS
from vaescale.data.lookup import evenly
from vaescale.mixtures import em
from vaescale.mixtures.gaussian import Kind, Mixture, log_density
from vaescale.mixtures.points import Moments, Points
from vaescale.mixtures.simpler import simpler
from vaescale.mixtures.starts import start
from vaescale.system.console import Progress

COMPONENTS = 10
FULL_LATENTS, ONE_FULL_LATENTS = 128, 4096  # largest number of latents for ten full covariances, and for one
IMAGES_A_COMPONENT = 2
FITTED_VALUES = 1 << 22  # maximum number of latent values to which a mixture is fitted, per half
MAX_ITERATIONS, TOLERANCE_NATS = 50, 1e-2  # every mixture gives a bound, so a converged fit is not needed
RIDGE = 1e-6  # of the mean variance of q(z|x)


class CrossFit(NamedTuple):
    """log_density: in nats, [M]. components, kind: of the mixtures; one component is a Gaussian, 0 the prior N(0, I)."""

    log_density: Tensor
    components: int
    kind: Kind


def cross_fit(moments: Moments, z: Tensor, numbers: Tensor, *, seed: int) -> CrossFit:
    """The log density of z [M, Z] float64, drawn from the images `numbers` (int64 [M]), under mixtures of other images.

    Of the prior, one Gaussian, and a mixture of 10 with its simpler covariances, the result is that with the highest mean
    density of the draws. All ranks call it.
    """
    densities: dict[tuple[int, Kind], Tensor] = {}
    images = torch.arange(moments.count)
    first_half = noise.uniform(noise.Stream(seed, 0, images), noise.HALF, ()) < 0.5
    for half in (first_half, ~first_half):
        others, drawn = images[~half], half[numbers]
        for components, mixture in _fits(moments, others, seed):
            if not _has_density(mixture):
                continue
            density = densities.setdefault((components, mixture.kind), torch.full_like(z[:, 0], -math.inf))
            density[drawn] = log_density(mixture, z[drawn])
    components, kind = max(densities, key=lambda name: float(densities[name].mean()))
    return CrossFit(densities[components, kind], components, kind)


def _fits(moments: Moments, images: Tensor, seed: int) -> Iterator[tuple[int, Mixture]]:
    """Yield the candidates fitted to the q(z|x) of some images, each with its number of components."""
    size = moments.size
    yield 0, Mixture(_ones(1), torch.zeros(1, size).double(), _ones(1, size), "diag")
    if not len(images):
        return
    wanted = images[evenly(len(images), max(1, FITTED_VALUES // size))]
    mean, variance = moments.rows(wanted), moments.variances(wanted)
    centre = mean.mean(0)
    if size > ONE_FULL_LATENTS:
        spread = mean.var(0, correction=0) + variance.mean(0)
        diagonal = Mixture(_ones(1), centre[None], spread[None], "diag")
        yield from ((1, mixture) for mixture in (diagonal, *simpler(diagonal)))
        return
    covariance = (mean - centre).T @ (mean - centre) / len(mean) + torch.diag(variance.mean(0))
    one = Mixture(_ones(1), centre[None], covariance[None], "full")
    yield from ((1, mixture) for mixture in (one, *simpler(one)))
    if len(mean) >= COMPONENTS * IMAGES_A_COMPONENT:
        mixture = _mixture(mean, variance, RIDGE * variance.mean(0), seed)
        yield from ((COMPONENTS, form) for form in (mixture, *simpler(mixture)))


def _mixture(mean: Tensor, variance: Tensor, ridge: Tensor, seed: int) -> Mixture:
    """A mixture fitted to the moments [N, Z] that every rank has, of which each rank takes its share."""
    share = torch.arange(comm.rank(), len(mean), comm.world_size())
    points = Points(mean[share], variance[share], numbers=share)
    kind: Kind = "full" if points.size <= FULL_LATENTS else "diag"
    name = f"fit {COMPONENTS} components to a half of the images"
    with Progress(
        name, MAX_ITERATIONS, unit="iterations", shown=comm.is_main(), quiet_seconds=QUIET_SECONDS
    ) as shown:
        shown.update(0, "k-means", passing=True)
        first = start(points, COMPONENTS, kind=kind, how="kmeans", seed=seed, ridge=ridge)
        return em.fit(
            points,
            first,
            ridge=ridge,
            tolerance=TOLERANCE_NATS,
            max_iterations=MAX_ITERATIONS,
            dtype=torch.float64,  # so that any number of ranks returns the same to 1e-9
            report=lambda done, nats: shown.update(done, f"{nats:.3f} nats"),
        ).mixture


def _has_density(mixture: Mixture) -> bool:
    """Return whether the covariances are positive definite despite rounding: latents may be 1e8 deviations from 0."""
    if mixture.kind in ("full", "tied"):
        return not torch.linalg.cholesky_ex(mixture.covariances).info.any()
    return bool((mixture.covariances > 0).all())


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)
