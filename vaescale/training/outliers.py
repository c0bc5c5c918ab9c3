"""The usual gradient norm, and which norms are too far above it.

The usual norm is exp of a running mean of the logarithm, over all steps, skipped ones included. With a fixed bound, a run that
exceeds it once could skip every later batch. This bound rises by skip_factor^(1 / 100) with each skipped step, so that 100 of
them raise it tenfold if the factor is 10, and training continues.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

HORIZON_STEPS = 100
TRUSTED_AFTER_STEPS = 20


class UsualNorm(NamedTuple):
    """A running mean of the log gradient norm.

    log_norm: the running sum of log norms, each multiplied by its weight; weight: the sum of the weights, from 0 to 1. Both
    float64 [].
    """

    log_norm: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The logarithm of the usual norm, float64 []."""
        return self.log_norm / self.weight.clamp_min(1e-9)

    @property
    def is_trusted(self) -> Tensor:
        """Whether enough steps have been seen to judge by, bool []."""
        return self.weight > 1 - (1 - 1 / HORIZON_STEPS) ** TRUSTED_AFTER_STEPS

    def is_exceeded(self, log_norm: Tensor, *, factor: float) -> Tensor:
        """Whether a norm is more than `factor` times the usual one, bool []."""
        return self.is_trusted & (log_norm > self.mean + math.log(factor))

    def learned(self, log_norm: Tensor, *, factor: float) -> Tensor:
        """The log norm that the running mean moves to: neither a leap nor a gradient of zero moves the bound by more than one
        step's share of the reach.
        """
        mean, reach = self.mean, math.log(factor)
        return torch.where(self.is_trusted, log_norm.clamp(mean - reach, mean + reach), log_norm)
