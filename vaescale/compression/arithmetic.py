"""Functions whose results have the same bits on every machine, of which probabilities are made.

The exponential functions of numpy, torch and the C library differ in the last bit between processors and versions, and one bit is
enough to decode garbage. Here everything is a sequence of single additions, multiplications, divisions and roundings of float64
arrays, which IEEE 754 defines to the last bit, each in a call of its own so that no compiler fuses two of them.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
BLOCK = 1 << 13  # values at once: the intermediate results stay in the processor's cache
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238  # with 21 zeros at its end, so that its product with a small integer is exact
LN2_LOW = 1.9082149292705877e-10
# 1/n!, from n = 10 down: on |r| <= ln(2)/2 the rest is below 3e-13 of the sum.
EXPONENTIAL = (
    2.7557319223985893e-07,
    2.7557319223985893e-06,
    2.4801587301587302e-05,
    1.984126984126984e-04,
    1.388888888888889e-03,
    8.333333333333333e-03,
    4.1666666666666664e-02,
    0.16666666666666666,
    0.5,
    1.0,
    1.0,
)
MOST_EXPONENT = 700.0
ROOT_HALF = 0.7071067811865476
# 2/n, from n = 21 down by twos: on |r| <= 0.172 the rest is below 1e-17 of the sum.
ARTANH = tuple(2.0 / n for n in range(21, 0, -2))
# Zelen & Severo 1964, formula 26.2.17 of Abramowitz & Stegun: within 7.5e-8 of the normal distribution function.
NORMAL = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)
NORMAL_SCALE = 0.2316419
INVERSE_ROOT_TWO_PI = 0.3989422804014327


def exponential(x: Reals) -> Reals:
    """exp(x), elementwise, x bounded to +-700; within 1e-12 of the exact value."""
    return _in_blocks(_exponential, x)


def logarithm(x: Reals) -> Reals:
    """ln(x) of positive numbers, elementwise, within 2 units of the last place."""
    return _in_blocks(_logarithm, x)


def logistic(x: Reals) -> Reals:
    """1 / (1 + exp(-x)), elementwise."""
    return _in_blocks(_logistic, x)


def normal_cdf(x: Reals) -> Reals:
    """The distribution function of N(0, 1), elementwise, within 7.5e-8; exactly 0 below -38 and 1 above 38."""
    return _in_blocks(_normal_cdf, x)


def _in_blocks(function: Callable[[Reals], Reals], x: Reals) -> Reals:
    flat = np.ascontiguousarray(x, dtype=np.float64).reshape(-1)
    result = np.empty_like(flat)
    for first in range(0, len(flat), BLOCK):
        result[first : first + BLOCK] = function(flat[first : first + BLOCK])
    return result.reshape(x.shape)


def _exponential(x: Reals) -> Reals:
    x = np.clip(x, -MOST_EXPONENT, MOST_EXPONENT)
    power = np.rint(x * LOG2_E)
    x -= power * LN2_HIGH
    x -= power * LN2_LOW
    total = np.full_like(x, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        total *= x
        total += coefficient
    # 2^power from its bits: an exact product.
    total *= ((power.astype(np.int64) + 1023) << 52).view(np.float64)
    return total


def _logarithm(x: Reals) -> Reals:
    """2 artanh((m - 1) / (m + 1)) of the part m between 0.71 and 1.42, and the power of 2."""
    part, power = np.frexp(x)  # exact
    low = part < ROOT_HALF
    part = np.where(low, part * 2.0, part)
    exponent = power - low.astype(np.float64)
    ratio = np.divide(part - 1.0, part + 1.0)
    square = ratio * ratio
    total = np.full_like(square, ARTANH[0])
    for coefficient in ARTANH[1:]:
        total *= square
        total += coefficient
    total *= ratio
    total += exponent * LN2_LOW
    total += exponent * LN2_HIGH
    return total


def _logistic(x: Reals) -> Reals:
    inverse = _exponential(-x)
    inverse += 1.0
    return np.divide(1.0, inverse, out=inverse)


def _normal_cdf(x: Reals) -> Reals:
    magnitude = np.minimum(np.abs(x), 38.0)
    density = _exponential(magnitude * magnitude * -0.5)
    density *= INVERSE_ROOT_TWO_PI
    t = np.divide(1.0, magnitude * NORMAL_SCALE + 1.0)
    tail = np.full_like(t, NORMAL[0])
    for coefficient in NORMAL[1:]:
        tail *= t
        tail += coefficient
    tail *= t
    tail *= density
    tail[magnitude >= 38.0] = 0.0
    return np.where(x > 0, 1.0 - tail, tail)
