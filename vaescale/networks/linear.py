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
from vaescale.networks.modulation import Shift


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

        self.encoder_shifts: Shift | None = None  # of a conditional network
        self.decoder_shifts: Shift | None = None

    def encode(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] in [0, 1] to the posterior's raw parameters [B, encoder_out]. embedding: of the condition, [B, E]."""
        mu = self.encoder(rearrange(x, "b c i j -> b (c i j)"))
        if self.encoder_shifts is not None and embedding is not None:
            mu = self.encoder_shifts(mu, embedding)
        return torch.cat([mu, self.log_sigma.to(mu).expand(mu.shape[0], -1)], dim=1)

    def decode(self, z: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [B, Z] to the likelihood's raw parameters [B, out_channels, H, W]. embedding: of the condition, [B, E]."""
        height, width = self.image_size
        decoded = self.decoder(z)
        if self.decoder_shifts is not None and embedding is not None:
            decoded = self.decoder_shifts(decoded, embedding)
        parameters: Tensor = rearrange(decoded, "b (c i j) -> b c i j", i=height, j=width)
        return parameters

    def add_condition(self, size: int) -> None:
        """Shift the posterior's mean and the decoder's parameters by linear maps of a condition's embedding [B, size]."""
        self.encoder_shifts = Shift(size, self.encoder.out_features)
        self.decoder_shifts = Shift(size, self.decoder.out_features)
