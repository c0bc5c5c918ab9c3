"""The variational autoencoder: everything that has a gradient happens in `VAE.forward`.

Data-parallel wrappers see what passes through the wrapped module's forward and nothing else, so the loss is built
from its Terms, never from `encode` or `decode` called beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.likelihoods import LIKELIHOODS, LikelihoodConfig
from vaescale.models.posterior import POSTERIORS, PosteriorConfig, gaussian_kl
from vaescale.networks import NETWORKS, NetworkConfig


class Terms(NamedTuple):
    """Per-example pieces of the objective. log_px [B] and kl [B, groups] in nats; squared_error [B], summed over
    pixels; mu [B, Z].
    """

    log_px: Tensor
    kl: Tensor
    squared_error: Tensor
    mu: Tensor


class VAE(nn.Module):
    """x -> q(z|x) -> z -> p(x|z), with the prior N(0, I)."""

    def __init__(
        self,
        network: NetworkConfig,
        posterior: PosteriorConfig,
        likelihood: LikelihoodConfig,
        *,
        image_size: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.latent_dim = network.latent_dim
        self.image_shape = (channels, image_size, image_size)
        self._posterior = POSTERIORS[posterior.kind]
        self.likelihood = LIKELIHOODS[likelihood.kind][1](likelihood)
        self.network = NETWORKS[network.kind][1](
            network,
            image_size=image_size,
            channels=channels,
            out_channels=self.likelihood.num_params(channels),
        )

    def forward(self, images: Tensor, stream: noise.Stream, mask: Tensor) -> Terms:
        """images uint8 [B, C, H, W], one slot of the stream each; mask bool [B], false for padding."""
        x = to_unit(images)
        mu, log_sigma = self.encode(x)
        z = mu + torch.exp(log_sigma) * noise.normal(stream, noise.POSTERIOR, (self.latent_dim,))
        params = self.network.decode(z)
        return Terms(
            log_px=self.likelihood.log_prob(x, params, mask),
            kl=gaussian_kl(mu, log_sigma)[:, None],
            squared_error=(x - self.likelihood.mean(params)).detach().square().flatten(1).sum(1),
            mu=mu,
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log sigma of q(z|x), [B, Z] each. x [B, C, H, W] in [0, 1]. For use without a gradient."""
        return self._posterior(self.network.encode(x))

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's raw parameters from z [B, Z]. For use without a gradient."""
        return self.network.decode(z)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], on the images' device."""
    return images.float() / 255
