"""What a condition does to the maps of a network: a scale and a shift of each channel, or a shift alone.

    x (1 + S e) + T e       with e the condition's embedding: feature-wise linear modulation, Perez et al. 2018, eq. 2

The maps, and the vectors of fully connected layers, are those after a block's activation: a shift before a normalization would be lost where a group has a single channel, and
ratios of channels pass the next one. The maps of a ladder, which has no normalization, are shifted only. S and T begin at 0, so that the
network begins as the one without a condition.

Legend: e [B, E]; a map [B, W, H, W'].
"""

from collections.abc import Mapping

from torch import Tensor, nn

from vaescale.networks.base import FlatNetwork
from vaescale.networks.config import Standardize
from vaescale.networks.layers import standardized

PARTS = ("encoder_modulations", "decoder_modulations", "encoder_shifts", "decoder_shifts", "group_shifts")
"""The names of a network's modules that only a conditional model has."""


class Modulation(nn.Module):
    """The scale and the shift of W channels."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2 * width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map [B, W, H, W'] or [B, W], and [B, E], to the shape of the first."""
        scale, shift = _places(self.linear(embedding), x).chunk(2, dim=1)
        modulated: Tensor = x * (1 + scale) + shift
        return modulated


class Shift(nn.Module):
    """The shift of W channels."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map [B, W, H, W'] or [B, W], and [B, E], to the shape of the first."""
        shifted: Tensor = x + _places(self.linear(embedding), x)
        return shifted


def _places(values: Tensor, x: Tensor) -> Tensor:
    """Values [B, W] that are the same at all places of x."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))


class ModulatedNetwork(FlatNetwork):
    """An encoder and a decoder of layers one after another, whose blocks a condition may modulate. Override `add_condition`."""

    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(self, standardize: Standardize | None) -> None:
        """standardize: see `layers.standardized`."""
        super().__init__()
        self._standardize = standardize
        # Of a conditional network's blocks, by the names of its layers.
        self.encoder_modulations: nn.ModuleDict | None = None
        self.decoder_modulations: nn.ModuleDict | None = None

    def encode(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map x [B, C, H, W] in [0, 1] to the posterior's raw parameters. embedding: of the condition, [B, E]."""
        x = standardized(x, self._standardize)
        return conditioned(self.encoder, x, self.encoder_modulations, embedding)

    def decode(self, z: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map z [B, *latent_shape] to the likelihood's raw parameters [B, out_channels, H, W]. embedding: of the condition, [B, E]."""
        return conditioned(self.decoder, z, self.decoder_modulations, embedding)

    def add_condition(self, size: int) -> None:
        """Set the modulations of the blocks by a condition's embedding [B, size]."""
        raise NotImplementedError


def modulations(size: int, widths: Mapping[str, int]) -> nn.ModuleDict:
    """Modulations for the layers of an nn.Sequential, whose names `widths` maps to channels. size: E."""
    return nn.ModuleDict({name: Modulation(size, width) for name, width in widths.items()})


def conditioned(
    layers: nn.Sequential, x: Tensor, modulations: nn.ModuleDict | None, embedding: Tensor | None
) -> Tensor:
    """Run layers one after another, those that `modulations` names with theirs: within the layer if it `takes_condition`, or after it."""
    if modulations is None or embedding is None:
        whole: Tensor = layers(x)
        return whole
    for name, layer in layers.named_children():
        if name not in modulations:
            x = layer(x)
        elif getattr(layer, "takes_condition", False):
            x = layer(x, modulations[name], embedding)
        else:
            x = modulations[name](layer(x), embedding)
    return x
