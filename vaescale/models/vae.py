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
    """Per-example pieces of the objective. log_px [B] and kl [B, groups] in nats; squared_error and variance [B], summed
    over pixels: (x - E[x|z])^2, and Var[x|z] where it depends on z (else NaN); mu [B, Z].
    """

    log_px: Tensor
    kl: Tensor
    squared_error: Tensor
    variance: Tensor
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
        self.likelihood = LIKELIHOODS[likelihood.kind][1](likelihood, image_shape=self.image_shape)
        self.network = NETWORKS[network.kind][1](
            network,
            image_size=image_size,
            channels=channels,
            out_channels=self.likelihood.num_params(channels),
        )

    def forward(self, images: Tensor, stream: noise.Stream, mask: Tensor) -> Terms:
        """images uint8 [B, C, H, W], one slot of the stream each; mask bool [B], false for padding."""
        x = self.target(images, stream)
        mu, log_sigma = self.encode(x)
        z = mu + torch.exp(log_sigma) * noise.normal(stream, noise.POSTERIOR, (self.latent_dim,))
        params = self.network.decode(z)
        # Autocast ends here: log-probabilities are never computed in half precision.
        with torch.autocast(x.device.type, enabled=False):
            squared_error, variance = self._moments(x, params.detach())
            return Terms(
                log_px=self.likelihood.log_prob(x, params, mask),
                kl=gaussian_kl(mu, log_sigma)[:, None],
                squared_error=squared_error,
                variance=variance,
                mu=mu,
            )

    def target(self, images: Tensor, stream: noise.Stream) -> Tensor:
        """What is encoded and modelled, [B, C, H, W] in [0, 1]: the images, binarized or dequantized if the likelihood
        does so.
        """
        dtype = next(self.parameters()).dtype
        x = images.to(dtype) / 255 if dtype == torch.float64 else to_unit(images)
        return self.likelihood.target(x, stream)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log sigma of q(z|x), [B, Z] each. x [B, C, H, W] from `target`. For use without a gradient."""
        parameters: Tensor = self.network.encode(x)
        return self._posterior(parameters)

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's raw parameters from z [B, Z]. For use without a gradient."""
        params: Tensor = self.network.decode(z)
        return params

    @torch.no_grad()
    def _moments(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        squared_error = (x - self.likelihood.mean(params)).square().flatten(1).sum(1)
        variance = self.likelihood.variance(params)
        if variance is None:
            return squared_error, torch.full_like(squared_error, torch.nan)
        return squared_error, x[0].numel() * variance.flatten(1).mean(1).to(squared_error).expand(len(x))


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], on the images' device."""
    return images.float() / 255
