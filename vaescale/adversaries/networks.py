"""Networks of discriminators. No layer has statistics over a batch: a logit depends on one example, on any number of ranks.

Legend: x [B, C, H, W] in [-1, 1]; h = H / 2^(number of widths), w likewise, V the last width; z [B, Z]; P logits of an example, one or one a patch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vaescale.adversaries.config import ImagePlayerConfig, LatentPlayerConfig, PairPlayerConfig
from vaescale.errors import UserError
from vaescale.networks.layers import ACTIVATIONS, LEAST_VALUES, num_groups, refuse_indivisible, spectral

LEAST_PATCH_MAP = 3  # two convolutions of 4x4 with a padding of 1 take a row each


class ImageCritic(nn.Module):
    """Logits of images: a strided convolutional body (Radford et al. 2016), and a linear layer or a PatchGAN's two convolutions."""

    def __init__(self, config: ImagePlayerConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *size = image_shape
        small, width = _small(config, size), config.widths[-1]
        self.body = nn.Sequential(*_halvings(config, channels, size))
        if config.network == "dcgan":
            self.head = nn.Sequential(
                nn.Flatten(1), _layer(nn.Linear(width * math.prod(small), 1), config.spectral_norm)
            )
            return
        if min(small) < LEAST_PATCH_MAP:
            raise UserError(
                f"network (='patch') needs maps of {LEAST_PATCH_MAP} rows after {len(config.widths)} halvings of {min(size)}; give fewer "
                "widths, or choose dcgan"
            )
        inner = nn.Conv2d(width, width, 4, padding=1)
        self.head = nn.Sequential(
            _layer(inner, config.spectral_norm),
            _norm(config, width, math.prod(side - 1 for side in small)),
            ACTIVATIONS["leaky_relu"](),
            _layer(nn.Conv2d(width, 1, 4, padding=1), config.spectral_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to logits [B, P]."""
        logits: Tensor = self.head(self.body(x)).flatten(1)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """The body's last maps [B, V h w], whose distances `vae_gan` takes for reconstruction errors."""
        maps: Tensor = self.body(x).flatten(1)
        return maps


class LatentCritic(nn.Module):
    """Logits of latents: a multilayer perceptron without normalization."""

    def __init__(self, config: LatentPlayerConfig, latent_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_perceptron((latent_dim, *config.latent_widths, 1), config.spectral_norm)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Map z [B, Z] to logits [B, 1]."""
        logits: Tensor = self.layers(z)
        return logits


class PairCritic(nn.Module):
    """Logits of pairs (z, x): the maps of x and z together go through one hidden layer."""

    def __init__(self, config: PairPlayerConfig, latent_dim: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *size = image_shape
        maps = config.widths[-1] * math.prod(_small(config, size))
        self.body = nn.Sequential(*_halvings(config, channels, size), nn.Flatten(1))
        self.head = nn.Sequential(*_perceptron((latent_dim + maps, config.hidden, 1), config.spectral_norm))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Map z [B, Z] and x [B, C, H, W] to logits [B, 1]."""
        maps = self.body(x)
        logits: Tensor = self.head(torch.cat([z.to(maps.dtype), maps], dim=1))
        return logits


def _small(config: ImagePlayerConfig, size: Sequence[int]) -> list[int]:
    halvings = len(config.widths)
    why = f"cannot be halved {halvings} times as the discriminator's widths ask"
    refuse_indivisible((size[0], size[1]), 2**halvings, why, "fewer widths")
    return [side // 2**halvings for side in size]


def _halvings(config: ImagePlayerConfig, channels: int, size: Sequence[int]) -> Iterator[nn.Module]:
    for number, width in enumerate(config.widths):
        size = [side // 2 for side in size]
        # torch's own: the backward pass of the networks' convolutions has no gradient
        yield _layer(nn.Conv2d(channels, width, 4, stride=2, padding=1), config.spectral_norm)
        yield _norm(config, width, math.prod(size)) if number else nn.Identity()
        yield ACTIVATIONS["leaky_relu"]()
        channels = width


def _perceptron(sizes: tuple[int, ...], spectral_norm: bool) -> Iterator[nn.Module]:
    for number, (size, following) in enumerate(itertools.pairwise(sizes), start=2):
        yield _layer(nn.Linear(size, following), spectral_norm)
        if number < len(sizes):
            yield ACTIVATIONS["leaky_relu"]()


def _layer(layer: nn.Module, spectral_norm: bool) -> nn.Module:
    return spectral(layer) if spectral_norm else layer


def _norm(config: ImagePlayerConfig, width: int, places: int) -> nn.Module:
    """torch's own GroupNorm, whose backward pass has a gradient, as R1 and R2 need."""
    if config.norm == "none" or width * places < LEAST_VALUES:
        return nn.Identity()
    return nn.GroupNorm(num_groups(width, 8, places), width)
