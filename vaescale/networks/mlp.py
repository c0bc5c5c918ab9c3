"""Fully connected encoder and decoder: for vectors, such as the latents of another model.

The input goes past the hidden layers to the last one, so that the network can leave an input as it is: the second stage of
Dai & Wipf 2019, section 4 and appendix, whose encoder and decoder concatenate their input with the last hidden layer.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from vaescale.networks.base import FlatNetwork
from vaescale.networks.config import MlpConfig
from vaescale.networks.modulation import Modulation


class MlpNetwork(FlatNetwork):
    """Hidden layers of config.widths in the encoder, and in the opposite order in the decoder."""

    def __init__(
        self,
        config: MlpConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.image_size, self.latent_shape = image_size, (config.latent_dim,)
        self.encoder = _Layers(channels * math.prod(image_size), config.widths, encoder_out)
        self.decoder = _Layers(config.latent_dim, config.widths[::-1], out_channels * math.prod(image_size))

        self.encoder_modulations: nn.ModuleList | None = None  # of a conditional network's hidden layers
        self.decoder_modulations: nn.ModuleList | None = None
        self._widths = config.widths

    def encode(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] to the posterior's raw parameters [B, encoder_out]. embedding: of the condition, [B, E]."""
        parameters: Tensor = self.encoder(x.flatten(1), self.encoder_modulations, embedding)
        return parameters

    def decode(self, z: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [B, Z] to the likelihood's raw parameters [B, out_channels, H, W]. embedding: of the condition, [B, E]."""
        height, width = self.image_size
        decoded = self.decoder(z, self.decoder_modulations, embedding)
        parameters: Tensor = rearrange(decoded, "b (c i j) -> b c i j", i=height, j=width)
        return parameters

    def add_condition(self, size: int) -> None:
        """Modulate every hidden layer by a condition's embedding [B, size]."""
        self.encoder_modulations = nn.ModuleList(Modulation(size, width) for width in self._widths)
        self.decoder_modulations = nn.ModuleList(Modulation(size, width) for width in self._widths[::-1])


class _Layers(nn.Module):
    """Hidden layers with SiLU, and a last linear layer over their output and the input."""

    def __init__(self, size: int, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        sizes = (size, *widths)
        self.hidden = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes[:-1], widths, strict=True)
        )
        self.head = nn.Linear(widths[-1] + size, out)

    def forward(self, x: Tensor, modulations: nn.ModuleList | None, embedding: Tensor | None) -> Tensor:
        hidden = x
        for number, layer in enumerate(self.hidden):
            hidden = silu(layer(hidden))
            if modulations is not None and embedding is not None:
                hidden = modulations[number](hidden, embedding)
        out: Tensor = self.head(torch.cat([hidden, x.to(hidden.dtype)], dim=1))
        return out
