"""The approximate posterior q(z|x) from raw parameters, and what Gaussians cost.

Legend: z of a latent vector is [B, Z], of a map [B, Z, H, W]; log sigma broadcasts over what it does not depend on.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vaescale.config import Config, one_of

LOG_SIGMA_BOUND = 8.0
Sigma = Annotated[float, Field(gt=0, le=1000)]


class Gaussian(NamedTuple):
    """Mean and log standard deviation, float32 or float64."""

    mu: Tensor
    log_sigma: Tensor

    def sample(self, epsilon: Tensor) -> Tensor:
        """mu + sigma epsilon."""
        return self.mu + torch.exp(self.log_sigma) * epsilon

    def log_density(self, z: Tensor) -> Tensor:
        """In nats, value by value."""
        standard = (z - self.mu) * torch.exp(-self.log_sigma)
        return -0.5 * (standard.square() + math.log(2 * math.pi)) - self.log_sigma


def kl(q: Gaussian, p: Gaussian | None = None) -> Tensor:
    """KL(q || p) in nats, value by value; without p of the standard normal. Kingma & Welling 2014, appendix B."""
    if p is None:
        return 0.5 * (q.mu.square() + torch.exp(2 * q.log_sigma) - 1) - q.log_sigma
    deviation, ratio = (q.mu - p.mu) * torch.exp(-p.log_sigma), q.log_sigma - p.log_sigma
    return 0.5 * (deviation.square() + torch.exp(2 * ratio) - 1) - ratio


def bounded(raw: Tensor) -> Tensor:
    """Raw log sigma bounded smoothly to +-8, near the identity around 0: exp stays finite and the gradient never stops."""
    return LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)


class DiagonalConfig(Config):
    """A mean and a standard deviation for each latent."""

    kind: Literal["diagonal"] = "diagonal"

    def num_params(self, latents: int) -> int:
        """Channels that the encoder must return."""
        return 2 * latents


class IsotropicConfig(Config):
    """A mean for each latent and one standard deviation for all of them (at each place of a map)."""

    kind: Literal["isotropic"] = "isotropic"

    def num_params(self, latents: int) -> int:
        """Channels that the encoder must return."""
        return latents + 1


class Decreasing(Config):
    """Standard deviations in a geometric series from the first channel to the last."""

    first: Sigma
    last: Sigma


class FixedConfig(Config):
    """A mean for each latent, and standard deviations that nothing changes: the CV-VAE of Ghosh et al. 2020."""

    kind: Literal["fixed"] = "fixed"
    sigma: Sigma | tuple[Sigma, ...] | Decreasing = Field(
        default=1.0,
        description="for all channels, a list of one each, or {first: 1, last: 0.01}: a geometric series over them",
    )

    @model_validator(mode="after")
    def _a_list_is_not_empty(self) -> "FixedConfig":
        if self.sigma == ():
            raise ValueError("sigma (=[]) has no number; give one for each channel")
        return self

    def num_params(self, latents: int) -> int:
        """Channels that the encoder must return."""
        return latents

    def sigmas(self, latents: int) -> list[float]:
        """One for each channel. Raises ValueError when the list has another length."""
        if isinstance(self.sigma, Decreasing):
            steps = [channel / max(1, latents - 1) for channel in range(latents)]
            return [self.sigma.first * (self.sigma.last / self.sigma.first) ** step for step in steps]
        given = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,) * latents
        if len(given) != latents:
            raise ValueError(
                f"posterior.sigma has {len(given)} numbers for network.latent_dim (={latents}); give {latents}, or one for all"
            )
        return list(given)


class RelativeConfig(Config):
    """Of a ladder: q = N(mu_p + dmu, (sigma_p dsigma)^2), so that nothing learned is q = p. Vahdat & Kautz 2020, section 3.2."""

    kind: Literal["relative"] = "relative"

    def num_params(self, latents: int) -> int:
        """Channels that the encoder must return."""
        return 2 * latents


def diagonal(raw: Tensor, log_sigmas: Tensor | None, prior: Gaussian | None) -> Gaussian:  # noqa: ARG001
    """raw [B, 2 Z, ...]: mean and log sigma."""
    mu, log_sigma = raw.chunk(2, dim=1)
    return Gaussian(mu, bounded(log_sigma))


def isotropic(raw: Tensor, log_sigmas: Tensor | None, prior: Gaussian | None) -> Gaussian:  # noqa: ARG001
    """raw [B, Z + 1, ...]: mean, and one log sigma."""
    mu, log_sigma = raw[:, :-1], raw[:, -1:]
    return Gaussian(mu, bounded(log_sigma).expand_as(mu))


def fixed(raw: Tensor, log_sigmas: Tensor | None, prior: Gaussian | None) -> Gaussian:  # noqa: ARG001
    """raw [B, Z, ...]: the mean. log_sigmas [Z], on its device."""
    assert log_sigmas is not None, "given by the model"
    return Gaussian(raw, log_sigmas.to(raw.dtype).view(1, -1, *(1 for _ in raw.shape[2:])).expand_as(raw))


def relative(raw: Tensor, log_sigmas: Tensor | None, prior: Gaussian | None) -> Gaussian:  # noqa: ARG001
    """raw [B, 2 Z, ...]: how far q is from the prior."""
    assert prior is not None, "refused in the recipe"
    moved, scaled = raw.chunk(2, dim=1)
    return Gaussian(prior.mu + moved, prior.log_sigma + bounded(scaled))


# kind -> (its recipe section, raw parameters, fixed log sigmas and the prior to Gaussian)
POSTERIORS: dict[str, tuple[type[Config], Callable[..., Gaussian]]] = {
    "diagonal": (DiagonalConfig, diagonal),
    "isotropic": (IsotropicConfig, isotropic),
    "fixed": (FixedConfig, fixed),
    "relative": (RelativeConfig, relative),
}

if TYPE_CHECKING:
    PosteriorConfig = DiagonalConfig | IsotropicConfig | FixedConfig | RelativeConfig
else:
    PosteriorConfig = one_of((config for config, _ in POSTERIORS.values()), default="diagonal")
