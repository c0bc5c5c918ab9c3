"""Gaussian decoder with independent values. Its sigma is a number, learned, optimal, or predicted: see vaescale/likelihoods/sigma.py.

    log p(x|z) = -sum (log sigma + log(2 pi) / 2 + (x - mean(z))^2 / (2 sigma^2))        nats, over D = C*H*W values

Kingma & Welling 2014 (appendix C.2); Rybkin, Daniilidis & Levine 2021, eq. 5, for one sigma. sigma = 1 is the plain
Gaussian VAE. A beta is a noise level: at sigma^2 = beta, beta times the negative ELBO, beta * (D / (2 beta) MSE + KL) =
D/2 MSE + beta KL, is the beta-VAE's loss up to a constant, so the gradients are proportional.
"""

import math

import torch
from torch import Tensor

from vaescale import noise
from vaescale.likelihoods.base import LocationScale
from vaescale.likelihoods.config import GaussianConfig
from vaescale.likelihoods.sigma import constant_sum, weighted_sum


class Gaussian(LocationScale):
    """The Gaussian likelihood: log N(x; mean, sigma^2)."""

    def __init__(self, config: GaussianConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape, power=2, factor=1.0)

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """The log density in nats [B]. In training mode the mask [B] excludes padding from sigma."""
        mean, raw = self.mean_and_raw(params)
        squared_error = (x - mean).square()
        log_sigma = self.state.log_sigma(squared_error, raw, mask)
        constant = constant_sum(log_sigma + 0.5 * math.log(2 * math.pi), x[0].numel())
        return -constant - 0.5 * weighted_sum(squared_error, -2 * log_sigma)

    def central_mass(self, x: Tensor, params: Tensor) -> Tensor | None:
        """The central mass erf(|e| / (sigma sqrt(2)))."""
        mean, raw = self.mean_and_raw(params)
        return torch.erf((x - mean).abs() / (math.sqrt(2) * self.state.evaluation_log_sigma(raw).exp()))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """The mean plus sigma times noise, not clipped to [0, 1]."""
        mean, raw = self.mean_and_raw(params)
        sigma = torch.exp(self.state.evaluation_log_sigma(raw)).to(mean)
        return mean + sigma * noise.normal(stream, noise.DECODER, tuple(mean.shape[1:]))
