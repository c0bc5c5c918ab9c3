"""Laplace decoder with independent values: an absolute error instead of a squared one.

    log p(x|z) = -sum (log(2 b) + |x - mean(z)| / b),   b = sigma / sqrt(2)                nats

The recipe's sigma is the standard deviation, as everywhere: sqrt(2) times the scale b. The optimal b is the mean absolute
error. The choices of sigma are those of the Gaussian: see vaescale/likelihoods/sigma.py.
"""

import math

import torch
from torch import Tensor

from vaescale import noise
from vaescale.likelihoods.base import LocationScale
from vaescale.likelihoods.config import LaplaceConfig
from vaescale.likelihoods.sigma import constant_sum, weighted_sum


class Laplace(LocationScale):
    """The Laplace likelihood: log Laplace(x; mean, sigma / sqrt(2))."""

    def __init__(self, config: LaplaceConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape, power=1, factor=math.sqrt(2))

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """The log density in nats [B]. In training mode the mask [B] excludes padding from sigma."""
        mean, raw = self.mean_and_raw(params)
        absolute_error = (x - mean).abs()
        log_sigma = self.state.log_sigma(absolute_error, raw, mask)
        constant = constant_sum(log_sigma + 0.5 * math.log(2), x[0].numel())
        return -constant - math.sqrt(2) * weighted_sum(absolute_error, -log_sigma)

    def central_mass(self, x: Tensor, params: Tensor) -> Tensor | None:
        """The central mass 1 - exp(-|e| / b)."""
        mean, raw = self.mean_and_raw(params)
        return -torch.expm1(-math.sqrt(2) * (x - mean).abs() / self.state.evaluation_log_sigma(raw).exp())

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw by the inverse distribution function, not clipped to [0, 1]."""
        mean, raw = self.mean_and_raw(params)
        scale = torch.exp(self.state.evaluation_log_sigma(raw)).to(mean) / math.sqrt(2)
        u = noise.uniform(stream, noise.DECODER, tuple(mean.shape[1:])).to(mean) - 0.5 + 2.0**-25
        return mean - scale * u.sign() * torch.log1p(-2 * u.abs())
