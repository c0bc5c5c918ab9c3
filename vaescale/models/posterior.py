"""The approximate posterior q(z|x) from raw parameters, and the KL of Gaussians.

Legend: z of a latent vector is [B, Z], of a map [B, Z, H, W]; log sigma broadcasts over axes on which it does not depend.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaescale.models.config import FixedConfig, PosteriorConfig

LOG_SIGMA_BOUND = 8.0


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean and log standard deviation, float32 or float64."""

    mu: Tensor
    log_sigma: Tensor

    def sample(self, epsilon: Tensor) -> Tensor:
        """Return the draw mu + sigma epsilon."""
        return self.mu + torch.exp(self.log_sigma) * epsilon

    def log_density(self, z: Tensor) -> Tensor:
        """The log density in nats, value by value."""
        standard = (z - self.mu) * torch.exp(-self.log_sigma)
        return -0.5 * (standard.square() + math.log(2 * math.pi)) - self.log_sigma


def kl(q: Gaussian, p: Gaussian | None = None) -> Tensor:
    """KL(q || p) in nats, value by value; p is the standard normal if None. Kingma & Welling 2014, appendix B."""
    if p is None:
        return 0.5 * (q.mu.square() + torch.exp(2 * q.log_sigma) - 1) - q.log_sigma
    deviation, ratio = (q.mu - p.mu) * torch.exp(-p.log_sigma), q.log_sigma - p.log_sigma
    return 0.5 * (deviation.square() + torch.exp(2 * ratio) - 1) - ratio


def bounded(raw: Tensor) -> Tensor:
    """Bound raw log sigma smoothly to +-8, near the identity around 0: exp stays finite and the gradient never vanishes."""
    return LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)


class Posterior(nn.Module):
    """The contract of a posterior: from the encoder's raw parameters to q(z|x). Override `forward`."""

    def __init__(self, config: PosteriorConfig, latents: int) -> None:  # noqa: ARG002
        """latents: the size of the latent vector, or the channels of a map or of each group."""
        super().__init__()

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:
        """Compute q(z|x) from raw [B, num_params(latents), ...], float32 or float64. prior: that of a ladder's group, or None."""
        raise NotImplementedError


class Diagonal(Posterior):
    """Diagonal q(z|x) from raw [B, 2 Z, ...]: mean and log sigma."""

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Split raw into the mean and log sigma, which is bounded smoothly."""
        mu, log_sigma = raw.chunk(2, dim=1)
        return Gaussian(mu, bounded(log_sigma))


class Isotropic(Posterior):
    """Isotropic q(z|x) from raw [B, Z + 1, ...]: mean, and one log sigma."""

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Split raw into the mean and log sigma, which is bounded smoothly."""
        mu, log_sigma = raw[:, :-1], raw[:, -1:]
        return Gaussian(mu, bounded(log_sigma).expand_as(mu))


class Fixed(Posterior):
    """q(z|x) with constant standard deviations, one for each channel, from raw [B, Z, ...]: the mean."""

    log_sigmas: Tensor

    def __init__(self, config: FixedConfig, latents: int) -> None:
        super().__init__(config, latents)
        self.register_buffer("log_sigmas", torch.tensor(config.sigmas(latents)).log(), persistent=False)

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Combine the mean with the constant standard deviations."""
        shape = (1, -1, *(1 for _ in raw.shape[2:]))
        return Gaussian(raw, self.log_sigmas.to(raw.dtype).view(shape).expand_as(raw))


class Relative(Posterior):
    """q(z|x) relative to the prior, from raw [B, 2 Z, ...]: differences of mean and log sigma."""

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:
        """Add the differences to the prior; raw zeros return the prior itself."""
        assert prior is not None, "refused in the recipe"
        moved, scaled = raw.chunk(2, dim=1)
        return Gaussian(prior.mu + moved, prior.log_sigma + bounded(scaled))
