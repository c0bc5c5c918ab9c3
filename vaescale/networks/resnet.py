"""Residual encoder and decoder with a latent map: the AutoencoderKL family of Rombach et al. 2022 (LDM, appendix E.1 and table 8).

    f4    latent_dim: 3,   multipliers: [1, 2, 4]
    f8    latent_dim: 4,   multipliers: [1, 2, 4, 4]
    f16   latent_dim: 16,  multipliers: [1, 1, 2, 2, 4], attention_at: [16]

Legend: x [B, C, H, W], f = 2^(len(multipliers) - 1), z [B, Z, H / f, W / f]. Maps are [B, W, R, R'], where `attention_at` gives the height R.
"""

import math
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from vaescale.errors import UserError
from vaescale.networks.attention import attend
from vaescale.networks.config import ResnetConfig
from vaescale.networks.layers import conv, nearest, norm, normed, refuse_indivisible
from vaescale.networks.modulation import ModulatedNetwork, Modulation, modulations

NORM_GROUPS = 32
Size = tuple[int, int]


class Norms(NamedTuple):
    """How the network's GroupNorms are built. groups: of each, or None for at most 32; eps: theirs."""

    groups: int | None
    eps: float

    def with_silu(self, width: int, size: Size) -> tuple[nn.Module, nn.Module]:
        """GroupNorm and SiLU as one layer, and an identity, which has a number of its own in checkpoints."""
        return normed("group", width, "silu", **self._options(size))

    def alone(self, width: int, size: Size) -> nn.Module:
        """GroupNorm of a map [B, width, *size]."""
        return norm("group", width, **self._options(size))

    def _options(self, size: Size) -> dict[str, Any]:
        exact = self.groups is not None
        return {
            "places": math.prod(size),
            "groups": self.groups or NORM_GROUPS,
            "exact": exact,
            "eps": self.eps,
        }


class ResnetNetwork(ModulatedNetwork):
    """The network of `kind: resnet`. Raises UserError when the image cannot be halved once for each further multiplier."""

    def __init__(
        self,
        config: ResnetConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__(config.standardize)
        halvings = len(config.multipliers) - 1
        refuse_indivisible(
            image_size,
            1 << halvings,
            f"cannot be halved {halvings} times as network.multipliers asks",
            "fewer multipliers",
        )
        sizes = [(image_size[0] >> level, image_size[1] >> level) for level in range(halvings + 1)]
        heights = [height for height, _ in sizes]
        if strange := set(config.attention_at) - set(heights):
            raise UserError(
                f"network.attention_at has {min(strange)}, but the maps are of sizes {heights}; take some of these"
            )
        small, norms = sizes[-1], Norms(config.norm_groups, config.norm_epsilon)
        widths_of_norms = {config.width, *(config.width * multiplier for multiplier in config.multipliers)}
        if odd := [width for width in sorted(widths_of_norms) if width % (config.norm_groups or 1)]:
            raise UserError(
                f"network.norm_groups (={config.norm_groups}) does not divide {odd[0]} channels; take a divisor of network.width"
            )
        self.latent_shape = (config.latent_dim, *small)
        widths = [config.width * multiplier for multiplier in config.multipliers]
        levels = list(zip(sizes, widths, strict=True))

        down: list[nn.Module] = [conv(channels, config.width, 3)]
        channels_before = config.width
        for number, (size, width) in enumerate(levels):
            attention = size[0] in config.attention_at
            down += _blocks(channels_before, width, config.blocks, norms, size=size, attention=attention)
            down += [Halve(width)] if number < halvings else []
            channels_before = width
        down += [
            *_middle(channels_before, config.attention, norms, size=small),
            *_end(channels_before, encoder_out, norms, size=small),
            conv(encoder_out, encoder_out, 1),
        ]
        self.encoder = nn.Sequential(*down)

        up: list[nn.Module] = [
            conv(config.latent_dim, config.latent_dim, 1),
            conv(config.latent_dim, channels_before, 3),
        ]
        up += _middle(channels_before, config.attention, norms, size=small)
        for number, (size, width) in enumerate(reversed(levels)):
            attention = size[0] in config.attention_at
            up += _blocks(channels_before, width, config.blocks + 1, norms, size=size, attention=attention)
            up += [Double(width)] if number < halvings else []
            channels_before = width
        self.decoder = nn.Sequential(*up, *_end(channels_before, out_channels, norms, size=image_size))

    def add_condition(self, size: int) -> None:
        """Modulate every residual block by a condition's embedding [B, size]."""
        self.encoder_modulations, self.decoder_modulations = (
            modulations(size, _widths_of_blocks(layers)) for layers in (self.encoder, self.decoder)
        )


class Residual(nn.Module):
    """A residual block x + f(x), with f of two 3x3 convolutions, each after GroupNorm and SiLU; a 1x1 convolution of x where widths differ."""

    takes_condition = True

    def __init__(self, channels: int, width: int, norms: Norms, *, size: Size) -> None:
        super().__init__()
        self.norm1, _ = norms.with_silu(channels, size)
        self.conv1 = conv(channels, width, 3)
        self.norm2, _ = norms.with_silu(width, size)
        self.conv2 = conv(width, width, 3)
        self.shortcut = conv(channels, width, 1) if channels != width else nn.Identity()

    def forward(
        self, x: Tensor, modulation: Modulation | None = None, embedding: Tensor | None = None
    ) -> Tensor:
        """Map [B, channels, R, R] to [B, width, R, R]. modulation: of the second convolution's input, by the embedding [B, E]."""
        inner = self.norm2(self.conv1(self.norm1(x)))
        if modulation is not None:
            inner = modulation(inner, embedding)
        inner = self.conv2(inner)
        total: Tensor = self.shortcut(x) + inner
        return total


class Attention(nn.Module):
    """Residual self-attention over the places of the map, with one head. Vaswani et al. 2017, eq. 1."""

    def __init__(self, width: int, norms: Norms, *, size: Size) -> None:
        super().__init__()
        self.norm = norms.alone(width, size)
        self.query, self.key, self.value = (conv(width, width, 1) for _ in range(3))
        self.out = conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to [B, W, R, R]."""
        inner, height = self.norm(x), x.shape[-2]
        query, key, value = (
            rearrange(layer(inner), "b w i j -> b (i j) w") for layer in (self.query, self.key, self.value)
        )
        mixed = attend(query, key, value)
        total: Tensor = x + self.out(rearrange(mixed, "b (i j) w -> b w i j", i=height))
        return total


class Halve(nn.Module):
    """Downsampling: a 3x3 convolution with stride 2, padded on the right and below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, W, R, R] to [B, W, R / 2, R / 2]."""
        halved: Tensor = self.conv(pad(x, (0, 1, 0, 1)))
        return halved


class Double(nn.Module):
    """Upsampling: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, W, R, R] to [B, W, 2 R, 2 R]."""
        doubled: Tensor = self.conv(nearest(x, 2))
        return doubled


def _blocks(
    channels: int, width: int, count: int, norms: Norms, *, size: Size, attention: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(count):
        layers.append(Residual(width if number else channels, width, norms, size=size))
        if attention:
            layers.append(Attention(width, norms, size=size))
    return layers


def _widths_of_blocks(layers: nn.Sequential) -> dict[str, int]:
    """The number and the channels of every residual block."""
    blocks = {name: layer for name, layer in layers.named_children() if isinstance(layer, Residual)}
    return {name: block.conv2.out_channels for name, block in blocks.items()}


def _middle(width: int, attention: bool, norms: Norms, *, size: Size) -> list[nn.Module]:
    between: list[nn.Module] = [Attention(width, norms, size=size)] if attention else []
    return [Residual(width, width, norms, size=size), *between, Residual(width, width, norms, size=size)]


def _end(width: int, out: int, norms: Norms, *, size: Size) -> list[nn.Module]:
    return [*norms.with_silu(width, size), conv(width, out, 3)]
