"""The contract of a network with a single latent vector or map.

A hierarchical network has groups in place of one encoder and decoder; `ladder.LadderNetwork` defines its interface. A network that takes
a condition, and whose section offers TAKES_CONDITION, has `add_condition`, as a `modulation.ModulatedNetwork` has.
Convolutions and norms come from `layers.py`.
"""

from torch import Tensor, nn


class FlatNetwork(nn.Module):
    """An encoder and a decoder without groups. Override `encode` and `decode`, and set `latent_shape`."""

    latent_shape: tuple[int, ...]
    """(Z,) for a vector, (Z, h, w) for a map, with Z = config.latent_dim."""

    @staticmethod
    def part_of(name: str) -> str:
        """The part, `encoder` or `decoder`, that a parameter or buffer of this name belongs to."""
        return (
            "decoder"
            if name.startswith(("decoder.", "decoder_modulations.", "decoder_shifts."))
            else "encoder"
        )

    @property
    def head_name(self) -> str:
        """The name of the layer that returns the likelihood's raw parameters."""
        *_, name = (name for name, _ in self.named_parameters() if name.startswith("decoder."))
        return name.rpartition(".")[0]

    def encode(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] in [0, 1] to the posterior's raw parameters [B, encoder_out, ...], means first."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Map z [B, *latent_shape] to the likelihood's raw parameters [B, out_channels, H, W]."""
        raise NotImplementedError
