"""Linear encoder and decoder with one posterior variance for all images: with an unbounded Gaussian mean, probabilistic PCA.

Lucas, Tucker, Grosse & Norouzi 2019: q(z|x) = N(V x + b, D), p(x|z) = N(W z + mu, sigma^2 I). Its best ELBO
is the exact log-likelihood of probabilistic PCA (Tipping & Bishop 1999), so training can be checked against it.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from vaescale.networks.base import FlatNetwork
from vaescale.networks.config import LinearConfig


class LinearNetwork(FlatNetwork):
    """A linear network. encode: [V x + b, log diagonal of D / 2]; decode: W z + mu."""

    def __init__(
        self,
        config: LinearConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.image_size, self.latent_shape = image_size, (config.latent_dim,)
        self.encoder = nn.Linear(channels * math.prod(image_size), config.latent_dim)
        self.log_sigma = nn.Parameter(torch.zeros(encoder_out - config.latent_dim))
        self.decoder = nn.Linear(config.latent_dim, out_channels * math.prod(image_size))
        nn.init.normal_(self.decoder.weight, std=1 / math.sqrt(config.latent_dim * math.prod(image_size)))

    def encode(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] in [0, 1] to the posterior's raw parameters [B, encoder_out]."""
        mu = self.encoder(rearrange(x, "b c i j -> b (c i j)"))
        return torch.cat([mu, self.log_sigma.to(mu).expand(mu.shape[0], -1)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Map [B, Z] to the likelihood's raw parameters [B, out_channels, H, W]."""
        height, width = self.image_size
        parameters: Tensor = rearrange(self.decoder(z), "b (c i j) -> b c i j", i=height, j=width)
        return parameters
