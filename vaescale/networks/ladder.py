"""The bodies of a hierarchical VAE of the VDVAE class. Child 2021, "Very deep VAEs generalize autoregressive models".

A bottom-up encoder computes a map at every resolution. The decoder runs top-down through groups; each group computes its prior
and posterior, adds z, and refines the map of its resolution. The model draws z and computes the KL
(`vaescale.models.ladder`).

Legend: a map is [B, W, R, R'] with W channels at resolution R, its height, which is its width R' for square images; z of a group [B, Z, R, R'].
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, pad

from vaescale.config import size_text
from vaescale.errors import UserError
from vaescale.networks import bottleneck
from vaescale.networks.config import LadderConfig
from vaescale.networks.layers import conv, nearest, recomputed, standardized
from vaescale.networks.modulation import Shift
from vaescale.networks.stages import Block, parse_decoder, parse_encoder, suggested

Maps = dict[int, Tensor]
SMALLEST_3X3 = 3  # on smaller maps a 3x3 kernel would mostly see padding


class LadderNetwork(nn.Module):
    """The network of `kind: ladder`. Raises UserError when the stages do not fit the image."""

    head_name = "head"

    def __init__(
        self,
        config: LadderConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        encoder, decoder = _stages(config, image_size)
        # Of a conditional network, one for each block of the encoder and for each group.
        self.encoder_shifts: nn.ModuleList | None = None
        self.group_shifts: nn.ModuleList | None = None
        self.latent_dim, self.checkpointing = config.latent_dim, config.checkpointing
        self._standardize = config.standardize
        height = self.height = image_size[0]
        self._widths = {
            block.resolution: config.widths.get(block.resolution, config.width) for block in decoder
        }
        self._widths |= {
            size: config.widths.get(size, config.width)
            for block in encoder
            for size in (block.resolution, block.resolution // block.pools)
        }
        widths = self._widths

        def inner(width: int) -> int:
            return max(1, int(width * config.bottleneck))

        self.stem = conv(channels, widths[height], 3)
        self.encoder = nn.ModuleList(
            Bottleneck(widths[block.resolution], inner(widths[block.resolution]), block, scale=len(encoder))
            for block in encoder
        )
        self.groups = nn.ModuleList(
            Group(
                widths[block.resolution],
                inner(widths[block.resolution]),
                block,
                latent_dim=config.latent_dim,
                encoder_out=encoder_out,
                scale=len(decoder),
            )
            for block in decoder
        )
        sizes = sorted({(block.resolution, block.width) for block in decoder})
        self.biases = nn.ParameterDict(
            {
                str(high): nn.Parameter(torch.zeros(1, widths[high], high, wide))
                for high, wide in sizes
                if high <= config.biases_up_to
            }
        )
        self.gain = nn.Parameter(torch.ones(widths[height]))
        self.bias = nn.Parameter(torch.zeros(widths[height]))
        self.head = conv(widths[height], out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def part_of(name: str) -> str:
        """The part that a parameter of this name belongs to: the `encoder` infers q(z|above, x), the `decoder` is the rest."""
        infers = name.startswith(("stem.", "encoder.", "encoder_shifts.")) or ".posterior_body." in name
        return "encoder" if infers else "decoder"

    def add_condition(self, size: int) -> None:
        """Shift the input map of every block and of every group by a condition's embedding [B, size]."""
        blocks = [cast("Bottleneck", block) for block in self.encoder]
        self.encoder_shifts = nn.ModuleList(Shift(size, block.width) for block in blocks)
        self.group_shifts = nn.ModuleList(
            Shift(size, self._widths[group.block.resolution])
            for group in (cast("Group", group) for group in self.groups)
        )

    def bottom_up(self, x: Tensor, embedding: Tensor | None = None) -> Maps:
        """Map [B, C, H, W] in [0, 1] to the last map of each resolution. embedding: of the condition, [B, E]."""
        feature_map = self.stem(self._ordered(standardized(x, self._standardize)))
        maps = {feature_map.shape[-2]: feature_map}
        for number, block in enumerate(self.encoder):
            if embedding is not None and self.encoder_shifts is not None:
                feature_map = self.encoder_shifts[number](feature_map, embedding)
            feature_map = recomputed(block, feature_map) if self.checkpointing else block(feature_map)
            feature_map = _to_width(feature_map, self._widths[feature_map.shape[-2]])
            maps[feature_map.shape[-2]] = feature_map
        return maps

    def start(self, rows: int) -> Maps:
        """The maps before the first group, the learned biases, for `rows` images."""
        return {int(size): bias.expand(rows, -1, -1, -1) for size, bias in self.biases.items()}

    def enter(self, block: Block, maps: Maps, *, like: Tensor) -> Tensor:
        """The input map of a group: the map of its resolution, plus the smaller map unpooled."""
        size, width = block.resolution, self._widths[block.resolution]
        feature_map = maps.get(size)
        # In the convolutions' precision: a float32 bias would turn every later sum into float32.
        feature_map = (
            like.new_zeros(like.shape[0], width, size, block.width)
            if feature_map is None
            else feature_map.to(like.dtype)
        )
        if block.mixes is not None:
            smaller = _to_width(maps[block.mixes], width)
            feature_map = feature_map + nearest(smaller, size // block.mixes)
        return self._ordered(feature_map)

    def _ordered(self, x: Tensor) -> Tensor:
        """x in the memory order in which the convolutions are fast."""
        body = cast("Group", self.groups[0]).prior_body
        return x if bottleneck.take(x, body.layers) else x.contiguous(memory_format=torch.channels_last)

    def shifted(self, number: int, feature_map: Tensor, embedding: Tensor) -> Tensor:
        """The input map of a group plus the shift of the condition, whose embedding is [B, E]."""
        assert self.group_shifts is not None
        total: Tensor = self.group_shifts[number](feature_map, embedding)
        return total

    def finish(self, maps: Maps) -> Tensor:
        """The likelihood's raw parameters [B, out_channels, H, W] from the last map."""
        gain, bias = (vector.view(1, -1, 1, 1) for vector in (self.gain, self.bias))
        parameters: Tensor = self.head(maps[self.height] * gain + bias)
        return parameters


class Bottleneck(nn.Module):
    """A residual block x + f(x) of 1x1, 3x3, 3x3 and 1x1 convolutions, then pooling. Child 2021, figure 3.

    The last weights are initialized 1 / sqrt(scale) times smaller, so that the sum over all blocks keeps its variance.
    """

    def __init__(self, width: int, inner: int, block: Block, *, scale: int) -> None:
        super().__init__()
        self.body, self.pools, self.width = Convolutions(width, inner, width, block), block.pools, width
        with torch.no_grad():
            self.body.c4.weight *= math.sqrt(1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, W, R, R'] to [B, W, R / pools, R' / pools]."""
        _, x = self.body.outputs(x, apart=0, added=True)
        return avg_pool2d(x, self.pools) if self.pools > 1 else x


class Group(nn.Module):
    """One stochastic group: the bodies of p(z|above) and q(z|above, x), and the update of the map by z."""

    def __init__(
        self, width: int, inner: int, block: Block, *, latent_dim: int, encoder_out: int, scale: int
    ) -> None:
        super().__init__()
        self.block, self.latent_dim, self.encoder_out = block, latent_dim, encoder_out
        self.posterior_body = Convolutions(2 * width, inner, encoder_out, block)
        self.prior_body = Convolutions(width, inner, 2 * latent_dim + width, block)
        nn.init.zeros_(self.prior_body.c4.weight)
        self.take_in = conv(latent_dim, width, 1)
        self.refine = Bottleneck(width, inner, Block(block.resolution, block.width), scale=scale)
        with torch.no_grad():
            self.take_in.weight *= math.sqrt(1 / scale)

    def posterior(self, feature_map: Tensor, seen: Tensor) -> Tensor:
        """Raw parameters of q(z|above, x), from the map and the encoder's map of this resolution."""
        raw, _ = self.posterior_body.outputs(feature_map, seen, apart=self.encoder_out, added=False)
        return raw

    def prior(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Raw parameters of p(z|above) [B, 2 Z, R, R'], and the updated map."""
        return self.prior_body.outputs(feature_map, apart=2 * self.latent_dim, added=True)

    def with_latents(self, feature_map: Tensor, z: Tensor) -> Tensor:
        """The map after z is added and the map is refined."""
        refined: Tensor = self.refine(feature_map + self.take_in(z))
        return refined


class Convolutions(nn.Module):
    """1x1, 3x3, 3x3 and 1x1 convolutions, each after a GELU; all 1x1 on maps of one or two rows or columns."""

    def __init__(self, channels: int, inner: int, width: int, block: Block) -> None:
        super().__init__()
        kernel = 3 if min(block.resolution, block.width) >= SMALLEST_3X3 else 1
        self.c1, self.c2 = conv(channels, inner, 1), conv(inner, inner, kernel)
        self.c3, self.c4 = conv(inner, inner, kernel), conv(inner, width, 1)

    @property
    def layers(self) -> tuple[nn.Conv2d, ...]:
        """The four convolutions."""
        return self.c1, self.c2, self.c3, self.c4

    def outputs(
        self, x: Tensor, seen: Tensor | None = None, *, apart: int, added: bool
    ) -> tuple[Tensor, Tensor]:
        """The convolutions of a map [B, C, R, R'], and of `seen` beside it, as two maps.

        The first `apart` outputs, and the others plus x if `added`. A map without channels may be None.
        """
        if bottleneck.take(x, self.layers) and bottleneck.fit(self.layers, x, seen, apart=apart, added=added):
            return bottleneck.convolutions(self.layers, x, seen, apart=apart, added=added)
        y = self(x if seen is None else torch.cat([x, seen], dim=1))
        if not added:
            return y, y[:, apart:]
        # Not two slices: their gradients would be two maps of zeros in another memory order, filled and summed.
        first, change = y.split([apart, y.shape[1] - apart], dim=1) if apart else (y[:, :0], y)
        return first, x + change

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, R, R'] to [B, width, R, R']."""
        for layer in self.layers:
            x = layer(gelu(x))
        return x


def _stages(config: LadderConfig, image_size: tuple[int, int]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    down, up = suggested(image_size)
    key = "encoder"
    try:
        encoder = parse_encoder(config.encoder or down, image_size=image_size)
        sizes = {size for block in encoder for size in (block.resolution, block.resolution // block.pools)}
        key = "decoder"
        return encoder, parse_decoder(config.decoder or up, image_size=image_size, resolutions=sizes)
    except ValueError as error:
        given = getattr(config, key) or (down if key == "encoder" else up)
        raise UserError(
            f"network.{key} (={','.join(given)}) does not fit data.image_size (={size_text(image_size)}): {error}"
        ) from error


def _to_width(feature_map: Tensor, width: int) -> Tensor:
    """Cut off channels, or append channels of zeros."""
    surplus = width - feature_map.shape[1]
    return pad(feature_map, (0, 0, 0, 0, 0, surplus)) if surplus > 0 else feature_map[:, :width]
