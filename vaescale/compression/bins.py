"""Latents in bins of equal mass under the prior, and the code of their posterior. Townsend, Bird & Barber 2019, section 2.5.

Under the prior each of 2^b bins costs exactly b bits. The posterior's mass of a bin is that of N(mu, sigma^2) between its edges. The
latent of a bin is the point that halves its mass. The bins are those of N(0, 1) in a prior's standard deviations from its mean.
"""

from functools import lru_cache

import numpy as np

from vaescale.compression.arithmetic import Reals, exponential, normal_cdf
from vaescale.compression.masses import BASE, Code, Integers, by_digits, table

ROUNDED = 2.0**-30  # edges are multiples of it: the C library's logarithm is not the same everywhere
BEYOND = 2.0**20  # the outermost edges


def posterior_code(q: Reals, p: Reals | None, bits: int) -> Code:
    """The code of 2^bits bins under the posterior. q and the prior p: means and log sigmas [B, 2 Z]; p None: N(0, 1)."""
    mu, log_sigma = _halves(q)
    if p is not None:  # in the prior's standard deviations from its mean
        prior_mu, prior_log_sigma = _halves(p)
        mu = (mu - prior_mu) * exponential(-prior_log_sigma)
        log_sigma = log_sigma - prior_log_sigma
    mu, inverse = mu.reshape(-1), exponential(-log_sigma).reshape(-1)
    return gaussian_code(mu, inverse, bits)


def gaussian_code(mu: Reals, inverse_sigma: Reals, bits: int) -> Code:
    """The code of the bins of N(0, 1) under Gaussians with these means and inverse sigmas, [N]."""
    edges = _edges(bits)

    def cdf(indices: Integers) -> Reals:
        deviation = edges[indices]
        deviation -= mu
        deviation *= inverse_sigma
        return normal_cdf(deviation)

    return by_digits(cdf, len(mu), 1 << bits)


def prior_code(number: int, bits: int) -> Code:
    """The code of bins under the prior: all have the same mass."""
    even = np.repeat(table([np.ones(1)] * BASE), number, axis=0)
    for _ in range(bits // 2):
        yield even


def latents(indices: Integers, p: Reals | None, bits: int) -> Reals:
    """The latents of bins [B, Z] of the prior p [B, 2 Z], or of N(0, 1)."""
    standard = _centres(bits)[indices]
    if p is None:
        return standard
    mu, log_sigma = _halves(p)
    standard *= exponential(log_sigma)
    standard += mu
    return standard


def _halves(gaussian: Reals) -> tuple[Reals, Reals]:
    """Means and log sigmas [B, Z] from [B, 2 Z]."""
    count = gaussian.shape[1] // 2
    return gaussian[:, :count], gaussian[:, count:]


@lru_cache
def _edges(bits: int) -> Reals:
    return _quantiles(np.arange((1 << bits) + 1) / (1 << bits))


@lru_cache
def _centres(bits: int) -> Reals:
    return _quantiles((np.arange(1 << bits) + 0.5) / (1 << bits))


def _quantiles(shares: Reals) -> Reals:
    from scipy.special import ndtri

    rounded: Reals = np.clip(np.rint(ndtri(shares) / ROUNDED) * ROUNDED, -BEYOND, BEYOND)
    return rounded
