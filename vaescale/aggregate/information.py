"""Decomposition of the KL of an ELBO into the information on x and the distance of q(z) from the prior.

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))                       Hoffman & Johnson 2016, "ELBO surgery"
    KL(q(z) || p(z)) = TC(z) + sum_j KL(q(z_j) || p(z_j))                     Chen et al. 2018, eq. 2

q(z) = 1/N sum_n q(z|x_n) over all images of a data set, summed exactly; the expectations are over draws of q(z|x) for some of
the images. I(x; z) is at most ln N. p(z) = N(0, I): latents of another prior are first scaled to it, which changes
none of these numbers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.lookup import evenly
from vaescale.errors import UserError
from vaescale.mixtures.points import Moments

QUERIES, MARGINAL_QUERIES = 2000, 256
VALUES = 1 << 21


class Information(NamedTuple):
    """The terms in nats, with the standard errors of the estimated terms.

    mean_kl is the left side of the first equation in closed form, over all images; its distance from mutual_information +
    aggregate_kl is the error of these estimates. Total correlation is estimated from fewer draws.
    """

    images: int
    draws: int
    mean_kl: float
    mutual_information: float
    mutual_information_error: float
    aggregate_kl: float
    aggregate_kl_error: float
    total_correlation: float
    total_correlation_error: float
    marginal_kl: float


def information(moments: Moments, *, seed: int, queries: int = QUERIES) -> Information:
    """Measure the terms over all ranks, from the means and variances of q(z|x). Raises UserError for a single image.

    queries: maximum number of draws for the expectations.
    """
    if moments.count < 2:
        raise UserError("there is one image; the information of latents needs several images")
    wanted = evenly(moments.count, queries)
    mean, variance = moments.rows(wanted), moments.variances(wanted)
    epsilon = noise.normal(noise.Stream(seed, 0, wanted), noise.POSTERIOR, (moments.size,)).double()
    z = mean + variance.sqrt() * epsilon
    of_own = (-0.5 * (epsilon.square() + variance.log() + math.log(2 * math.pi))).sum(1)
    of_prior = (-0.5 * (z.square() + math.log(2 * math.pi))).sum(1)
    of_all = aggregate_log_density(moments, z)
    few = slice(None, None, -(-len(z) // MARGINAL_QUERIES))
    by_latent = marginal_log_densities(moments, z[few]).sum(1)
    sums = [_kl(*batch).sum() for batch in _few(moments, moments.size)]
    local = torch.stack([torch.zeros((), dtype=torch.float64), *sums]).sum()
    mean_kl = comm.all_reduce_sum(local[None])[0] / moments.count
    # Control variate: the KL of the drawn images is known in closed form, so their choice adds no variance.
    of_images = _kl(mean, variance) - mean_kl
    terms = (of_own - of_all, of_all - of_prior - of_images, of_all[few] - by_latent)
    estimates = [(float(term.mean()), float(term.std() / math.sqrt(len(term)))) for term in terms]
    (mutual, mutual_error), (aggregate, aggregate_error), (total, total_error) = estimates
    return Information(
        images=moments.count,
        draws=len(z),
        mean_kl=float(mean_kl),
        mutual_information=mutual,
        mutual_information_error=mutual_error,
        aggregate_kl=aggregate,
        aggregate_kl_error=aggregate_error,
        total_correlation=total,
        total_correlation_error=total_error,
        marginal_kl=float((by_latent - of_prior[few]).mean()),
    )


def aggregate_log_density(moments: Moments, z: Tensor) -> Tensor:
    """log q(z) [M] in nats of z [M, Z] float64, over all ranks' images: log 1/N sum_n N(z; mean_n, variance_n)."""
    parts = []
    for mean, variance in _few(moments, len(z)):
        # -1/2 sum_j (z_j - m_j)^2 / v_j = z^2 . (-1/2v) + z . (m/v) - sum m^2 / 2v: two matrix products
        precision = variance.reciprocal()
        constant = -0.5 * (mean.square() * precision + variance.log() + math.log(2 * math.pi)).sum(1)
        joint = z.square() @ (-0.5 * precision).T + z @ (mean * precision).T + constant
        parts.append(torch.logsumexp(joint, dim=1))
    return _over_ranks(parts, z[:, 0]) - math.log(moments.count)


def marginal_log_densities(moments: Moments, z: Tensor) -> Tensor:
    """log q(z_j) [M, Z] in nats of z [M, Z] float64, latent by latent, over all ranks' images."""
    parts = []
    for mean, variance in _few(moments, z.numel()):
        standard = (z[:, None] - mean) * variance.rsqrt()
        log_normal = -0.5 * (standard.square() + variance.log() + math.log(2 * math.pi))
        parts.append(torch.logsumexp(log_normal, dim=1))
    return _over_ranks(parts, z) - math.log(moments.count)


def _few(moments: Moments, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's moments in batches whose products with `width` fit in memory, float64."""
    rows = max(16, VALUES // max(1, width))
    for means, variances in moments.parts():
        assert variances is not None, "expected moments, got draws"
        for mean, variance in zip(torch.split(means, rows), torch.split(variances, rows), strict=True):
            yield mean.double().cpu(), variance.double().cpu()


def _over_ranks(batches: list[Tensor], like: Tensor) -> Tensor:
    """Log-sum-exp over the batches of all ranks."""
    nothing = torch.full_like(like, -math.inf)
    local = torch.logsumexp(torch.stack([nothing, *batches]), dim=0)
    return torch.logsumexp(torch.stack(comm.gather_object(local)), dim=0)


def _kl(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) in nats, from [N, Z] to [N]."""
    return 0.5 * (mean.square() + variance - 1 - variance.log()).sum(1)
