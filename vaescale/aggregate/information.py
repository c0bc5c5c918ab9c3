"""Decomposition of the KL of an ELBO into the information on x and the distance of q(z) from the prior.

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))                       Hoffman & Johnson 2016, "ELBO surgery"
    KL(q(z) || p(z)) = TC(z) + sum_j KL(q(z_j) || p(z_j))                     Chen et al. 2018, eq. 2

q(z) is a sum over all images of a data set; the expectations are over draws of q(z|x) for some of the images. N images know
q(z) only so far, and the draw's own image is one of them. So there are three estimates of log q(z), and of each term:

    own term included   log 1/N sum_n q(z|x_n)              I is at most ln N, too low; KL and TC are too high by as much
    leave-one-out       log 1/(N-1) sum_{n != i} q(z|x_n)   I is too high; KL and TC are too low     (Poole et al. 2019, eq. 13)
    mixture             log r(z), r fitted to other images  I is too high by KL(q(z)||r(z)); KL and TC are too low by as much

all in expectation. The first two agree where an image's own term is a small share of q(z). p(z) = N(0, I): latents of another
prior are first scaled to it, which changes none of these numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.aggregate.cross_fit import cross_fit
from vaescale.aggregate.densities import LOG_2_PI, batches, marginal_log_densities, others_log_density
from vaescale.data.lookup import evenly
from vaescale.errors import UserError
from vaescale.mixtures.points import Moments

QUERIES, MARGINAL_QUERIES = 2000, 256
MOST_OWN_SHARE = 0.1  # from here on the number of images decides the terms with the own term included


class Information(NamedTuple):
    """The terms in nats, with the standard errors of the estimated terms.

    mutual_information, aggregate_kl and total_correlation have the image's own term included; the same names with
    _leave_one_out and _mixture are the other two estimates. own_share: mean share of an image's own term in q(z).
    mixture_components, mixture_covariance: of the mixture; 0 components are the prior. By the mixture, information and KL add
    up to mean_kl exactly.

    mean_kl is the left side of the first equation in closed form, over all images; its distance from mutual_information +
    aggregate_kl is the error of these estimates. Total correlation is estimated from fewer draws. The marginals of its
    estimates have the own term included.
    """

    images: int
    draws: int
    own_share: float
    mean_kl: float
    mutual_information: float
    mutual_information_error: float
    aggregate_kl: float
    aggregate_kl_error: float
    total_correlation: float
    total_correlation_error: float
    marginal_kl: float
    mutual_information_leave_one_out: float
    mutual_information_leave_one_out_error: float
    aggregate_kl_leave_one_out: float
    aggregate_kl_leave_one_out_error: float
    total_correlation_leave_one_out: float
    total_correlation_leave_one_out_error: float
    mutual_information_mixture: float
    mutual_information_mixture_error: float
    aggregate_kl_mixture: float
    aggregate_kl_mixture_error: float
    total_correlation_mixture: float
    total_correlation_mixture_error: float
    mixture_components: int
    mixture_covariance: str

    @property
    def limited(self) -> bool:
        """Return whether the number of images decides the terms with the own term included."""
        return self.own_share > MOST_OWN_SHARE


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
    of_own = (-0.5 * (epsilon.square() + variance.log() + LOG_2_PI)).sum(1)
    of_prior = (-0.5 * (z.square() + LOG_2_PI)).sum(1)
    of_others = others_log_density(moments, z, wanted)
    summed = torch.logaddexp(of_others + math.log(moments.count - 1), of_own)
    of_all = summed - math.log(moments.count)
    fitted = cross_fit(moments, z, wanted, seed=seed)
    few = slice(None, None, -(-len(z) // MARGINAL_QUERIES))
    by_latent = marginal_log_densities(moments, z[few]).sum(1)
    mean_kl = _mean_kl(moments)
    # Control variate: the KL of the drawn images is known in closed form, so their choice adds no variance.
    of_images = _kl(mean, variance) - mean_kl
    estimates: dict[str, float] = {}
    for ending, density in (("", of_all), ("_leave_one_out", of_others)):
        estimates |= _estimate("mutual_information", ending, of_own - density)
        estimates |= _estimate("aggregate_kl", ending, density - of_prior - of_images)
        estimates |= _estimate("total_correlation", ending, density[few] - by_latent)
    by_mixture = _controlled(of_own - fitted.log_density, of_own - of_prior - mean_kl)
    estimates |= _estimate("mutual_information", "_mixture", by_mixture)
    estimates |= _estimate("aggregate_kl", "_mixture", mean_kl - by_mixture)
    estimates |= _estimate("total_correlation", "_mixture", fitted.log_density[few] - by_latent)
    return Information(
        images=moments.count,
        draws=len(z),
        own_share=float((of_own - summed).exp().mean()),
        mean_kl=mean_kl,
        marginal_kl=float((by_latent - of_prior[few]).mean()),
        mixture_components=fitted.components,
        mixture_covariance=fitted.kind,
        **estimates,
    )


def _estimate(name: str, ending: str, term: Tensor) -> dict[str, float]:
    """The mean of a term [M] over the draws, and its standard error, under the names of `Information`."""
    error = float(term.std() / math.sqrt(len(term)))
    return {f"{name}{ending}": float(term.mean()), f"{name}{ending}_error": error}


def _controlled(term: Tensor, control: Tensor) -> Tensor:
    """The term [M] less the multiple of `control`, whose expectation is 0, that leaves the smallest variance."""
    centred = control - control.mean()
    share = (centred @ (term - term.mean())) / centred.square().sum().clamp_min(1e-300)
    return term - share * control


def _mean_kl(moments: Moments) -> float:
    """The mean KL(q(z|x) || p(z)) in nats over all images."""
    sums = [_kl(mean, variance).sum() for mean, variance, _ in batches(moments, moments.size)]
    local = torch.stack([torch.zeros((), dtype=torch.float64), *sums]).sum()
    return float(comm.all_reduce_sum(local[None])[0]) / moments.count


def _kl(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) in nats, from [N, Z] to [N]."""
    return 0.5 * (mean.square() + variance - 1 - variance.log()).sum(1)
