"""Strided convolutional encoder and decoder: given widths, each with a halving of the resolution, or a published network.

Legend: x [B, C, H, W], V = the encoder's last width, h = H / (product of the decoder's strides), w likewise, z [B, Z] or, as a latent map, [B, Z, h, w]. GroupNorm unless
the recipe or a preset says otherwise: a curve must not depend on how many images a process holds.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from einops.layers.torch import Rearrange
from torch import nn

from vaescale.networks.config import ConvConfig, Norm
from vaescale.networks.layers import (
    ACTIVATIONS,
    conv,
    deconv,
    has_bias,
    norm,
    normed,
    refuse_indivisible,
    spectral,
)
from vaescale.networks.modulation import ModulatedNetwork, modulations
from vaescale.networks.presets import PRESETS, Preset

WIDTHS = (32, 64)


class ConvNetwork(ModulatedNetwork):
    """The network of `kind: conv`. Raises UserError when the image cannot be halved once for each width."""

    def __init__(
        self,
        config: ConvConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__(config.standardize)
        plan = PRESETS[config.preset] if config.preset else _from_widths(config.widths or WIDTHS)
        kind: Norm = config.norm or plan.norm  # type: ignore[assignment]
        key = f"network.preset (={config.preset})" if config.preset else "network.widths"
        halvings = math.prod(stride for _, _, stride in plan.encoder)
        doublings = math.prod([stride for _, _, stride in plan.decoder]) * plan.last[1]
        refuse_indivisible(
            image_size,
            max(halvings, doublings),
            f"cannot be halved {math.log2(max(halvings, doublings)):.0f} times as {key} asks",
            "a network of fewer halvings" if config.preset else "fewer widths",
        )
        self.latent_shape = (config.latent_dim,)
        small, start = ([side // factor for side in image_size] for factor in (halvings, doublings))
        width = self._decoder_width = plan.encoder[-1][0]
        if config.latent_map:
            self.latent_shape = (config.latent_dim, *small)
            self.encoder = nn.Sequential(
                *_encoder_maps(plan, channels, kind, image_size),
                conv(width, encoder_out, 1),  # [B, encoder_out, *small]
            )
            self.decoder = nn.Sequential(
                conv(config.latent_dim, width, 1),
                *_decoder_maps(plan, width, kind, start),
                _last(plan, out_channels),
            )
            return
        sizes = (width * math.prod(small), *plan.hidden, encoder_out)
        self.encoder = nn.Sequential(
            *_encoder_maps(plan, channels, kind, image_size),
            Rearrange("b w i j -> b (w i j)"),  # [B, V prod(small)]
            *_hidden(sizes, kind, plan.activation, spectral_norm=plan.spectral),  # [B, encoder_out]
        )
        sizes = (config.latent_dim, *reversed(plan.hidden), width * math.prod(start))
        start_norm = kind if plan.start_norm else "none"
        self.decoder = nn.Sequential(
            *_hidden(sizes, kind, plan.decoder_activation, before=start_norm),
            *([norm(start_norm, width * math.prod(start), places=1)] if start_norm != "none" else []),
            *([ACTIVATIONS[plan.decoder_activation]()] if plan.start_activation else []),
            Rearrange("b (w i j) -> b w i j", i=start[0], j=start[1]),
            *_decoder_maps(plan, width, kind, start),
            _last(plan, out_channels),  # [B, out_channels, H, W]
        )

    def add_condition(self, size: int) -> None:
        """Modulate the maps of every block, and the decoder's first map, by a condition's embedding [B, size]."""
        arranged = [name for name, layer in self.decoder.named_children() if isinstance(layer, Rearrange)]
        start = {(arranged or ["0"])[0]: self._decoder_width}  # the layer that returns the first map
        self.encoder_modulations = modulations(size, _widths_of_blocks(self.encoder))
        self.decoder_modulations = modulations(size, {**start, **_widths_of_blocks(self.decoder)})


def _from_widths(widths: tuple[int, ...]) -> Preset:
    upwards = (*reversed(widths[:-1]), widths[0])
    return Preset(
        encoder=tuple((width, 4, 2) for width in widths),
        decoder=tuple((width, 4, 2) for width in upwards),
        last=(3, 1),
        norm="group",
        start_activation=False,
        activation="silu",
        decoder_activation="silu",
    )


def _encoder_maps(plan: Preset, channels: int, kind: Norm, size: Sequence[int]) -> Iterator[nn.Sequential]:
    for number, (width, kernel, stride) in enumerate(plan.encoder):
        size = [side // stride for side in size]
        own = kind if number or plan.first_norm else "none"
        layer: nn.Module = conv(channels, width, kernel, stride=stride, before=own)
        layer = spectral(layer) if plan.spectral else layer
        yield nn.Sequential(layer, *normed(own, width, plan.activation, places=math.prod(size)))
        channels = width


def _decoder_maps(plan: Preset, channels: int, kind: Norm, size: Sequence[int]) -> Iterator[nn.Sequential]:
    for width, kernel, stride in plan.decoder:
        size = [side * stride for side in size]
        layer = deconv(channels, width, kernel, stride=stride, before=kind)
        yield nn.Sequential(layer, *normed(kind, width, plan.decoder_activation, places=math.prod(size)))
        channels = width


def _widths_of_blocks(layers: nn.Sequential) -> dict[str, int]:
    """The number and the channels of every block of maps."""
    blocks = {name: layer[0] for name, layer in layers.named_children() if isinstance(layer, nn.Sequential)}
    return {
        name: layer.out_channels
        for name, layer in blocks.items()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    }


def _last(plan: Preset, out_channels: int) -> nn.Module:
    (kernel, stride), width = plan.last, plan.decoder[-1][0]
    return conv(width, out_channels, kernel) if stride == 1 else deconv(width, out_channels, kernel)


def _hidden(
    sizes: tuple[int, ...],
    kind: Norm,
    activation: str,
    *,
    spectral_norm: bool = False,
    before: Norm = "none",
) -> Iterator[nn.Module]:
    """Fully connected layers with norm and activation between them, but not after the last layer.

    before: the normalization that follows the last layer; see `layers.has_bias`.
    """
    for number, (size, following) in enumerate(itertools.pairwise(sizes), start=2):
        is_last = number == len(sizes)
        layer: nn.Module = nn.Linear(size, following, bias=has_bias(before if is_last else kind))
        yield spectral(layer) if spectral_norm else layer
        if not is_last:
            yield from normed(kind, following, activation, places=1)
