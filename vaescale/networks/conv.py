"""Strided convolutional encoder and its mirror image, one halving of the resolution per width.

Legend: x [B, C, S, S], W = widths[-1], s = S / 2^len(widths), z [B, Z]. GroupNorm, not BatchNorm: a curve must not
depend on how many images a process holds.
"""

import itertools
import math
from typing import Annotated, Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import Tensor, nn

from vaescale.config import Config
from vaescale.errors import UserError


class ConvConfig(Config):
    """A DCGAN-like encoder and decoder."""

    kind: Literal["conv"] = "conv"
    latent_dim: int = Field(gt=0, description="size of z")
    widths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(32, 64), min_length=1, description="channels after each halving of the resolution"
    )


class ConvNetwork(nn.Module):
    """Raises UserError when the image cannot be halved `len(widths)` times."""

    def __init__(self, config: ConvConfig, *, image_size: int, channels: int, out_channels: int) -> None:
        super().__init__()
        small = _smallest_map(image_size, len(config.widths))
        widths = [channels, *config.widths]
        features = config.widths[-1] * small * small
        self.encoder = nn.Sequential(
            *(_down(wide, wider) for wide, wider in itertools.pairwise(widths)),  # [B, W, s, s]
            Rearrange("b w i j -> b (w i j)"),
            nn.Linear(features, 2 * config.latent_dim),  # [B, 2 Z]
        )
        widths = [*reversed(config.widths), config.widths[0]]
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, features),
            Rearrange("b (w i j) -> b w i j", i=small, j=small),
            *(_up(wide, narrow) for wide, narrow in itertools.pairwise(widths)),  # [B, widths[0], S, S]
            nn.Conv2d(widths[-1], out_channels, 3, padding=1),  # [B, out_channels, S, S]
        )

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, S, S] in [0, 1] to the posterior's raw parameters [B, 2 Z]."""
        parameters: Tensor = self.encoder(2 * x - 1)
        return parameters

    def decode(self, z: Tensor) -> Tensor:
        """[B, Z] to the likelihood's raw parameters [B, out_channels, S, S]."""
        parameters: Tensor = self.decoder(z)
        return parameters


def _down(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 4, stride=2, padding=1), _norm(width), nn.SiLU())


def _up(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), _norm(width), nn.SiLU())


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, 8), width)


def _smallest_map(image_size: int, halvings: int) -> int:
    factor = 1 << halvings
    if image_size % factor:
        below = image_size // factor * factor
        fits = " or ".join(str(size) for size in (below, below + factor) if size)
        raise UserError(
            f"data.image_size (={image_size}) cannot be halved {halvings} times as network.widths asks; "
            f"use {fits}, or fewer widths"
        )
    return image_size // factor
