"""The approximate posterior q(z|x) from the encoder's raw parameters."""

from typing import Literal

import torch
from torch import Tensor

from vaescale.config import Config

LOG_SIGMA_BOUND = 8.0


class PosteriorConfig(Config):
    """A Gaussian with diagonal covariance."""

    kind: Literal["diagonal"] = "diagonal"


def diagonal(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log sigma, float32 or float64 [B, Z] each, from raw parameters [B, 2 Z].

    Log sigma is bounded smoothly to +-8, near the identity around 0: exp stays finite and the gradient never stops.
    """
    wide = parameters if parameters.dtype == torch.float64 else parameters.float()
    mu, raw = wide.chunk(2, dim=1)
    return mu, LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)


def gaussian_kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) in nats, summed over latents.

    mu, log_sigma: [B, Z]. Returns [B]. Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mu.square() + torch.exp(2 * log_sigma) - 1 - 2 * log_sigma).sum(dim=1)


POSTERIORS = {"diagonal": diagonal}
