"""Latents in bins of equal mass under the prior N(0, 1), and the code of their posterior. Townsend, Bird & Barber 2019, section 2.5.

Under the prior each of 2^b bins costs exactly b bits. The posterior's mass of a bin is that of N(mu, sigma^2) between its edges. The
latent of a bin is the point that halves its mass.
"""

from functools import lru_cache

import numpy as np

from vaescale.compression.arithmetic import Reals, exponential, normal_cdf
from vaescale.compression.masses import BASE, Code, Integers, by_digits, table

ROUNDED = 2.0**-30  # edges are multiples of it: the C library's logarithm is not the same everywhere
BEYOND = 2.0**20  # the outermost edges


def posterior_code(mu: Reals, log_sigma: Reals, bits: int) -> Code:
    """The code of bins under the posterior: mu and log sigma [N], 2^bits bins."""
    edges, inverse = _edges(bits), exponential(-log_sigma)

    def cdf(indices: Integers) -> Reals:
        deviation = edges[indices]
        deviation -= mu
        deviation *= inverse
        return normal_cdf(deviation)

    return by_digits(cdf, len(mu), 1 << bits)


def prior_code(number: int, bits: int) -> Code:
    """The code of bins under the prior: all have the same mass."""
    even = table([np.ones(number)] * BASE)
    for _ in range(bits // 2):
        yield even


def centre(indices: Integers, bits: int) -> Reals:
    """The latents of bins."""
    return _centres(bits)[indices]


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
