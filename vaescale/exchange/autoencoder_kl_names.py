"""The names of an AutoencoderKL's tensors for those of `ResnetNetwork`, whose layers have numbers in order."""

from collections.abc import Mapping

from vaescale.config import Size, sides
from vaescale.networks.config import ResnetConfig

RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}


def names_of(network: ResnetConfig, *, image_size: Size) -> dict[str, str]:
    """The name in an AutoencoderKL of each parameter of the network, whose sequential layers have numbers."""
    sizes = [sides(image_size)[0] >> level for level in range(len(network.multipliers))]
    down = _Numbers("encoder")
    down.take("encoder.conv_in")
    before = 1
    for level, (size, multiplier) in enumerate(zip(sizes, network.multipliers, strict=True)):
        place = f"encoder.down_blocks.{level}"
        before = down.level(place, network, network.blocks, size, before, multiplier)
        if level < len(sizes) - 1:
            down.take(f"{place}.downsamplers.0.conv", "conv")
    down.end("encoder", network)
    down.take("quant_conv")
    up = _Numbers("decoder")
    up.take("post_quant_conv")
    up.take("decoder.conv_in")
    up.middle("decoder", network)
    for level, (size, multiplier) in enumerate(
        zip(reversed(sizes), reversed(network.multipliers), strict=True)
    ):
        place = f"decoder.up_blocks.{level}"
        before = up.level(place, network, network.blocks + 1, size, before, multiplier)
        if level < len(sizes) - 1:
            up.take(f"{place}.upsamplers.0.conv", "conv")
    up.last("decoder")
    return down.names | up.names


class _Numbers:
    """The names of a sequence of layers, which are numbered in order."""

    def __init__(self, sequence: str) -> None:
        self.names: dict[str, str] = {}
        self._sequence, self._next = sequence, 0

    def take(self, there: str, within: str = "") -> None:
        """The next layer, with weight and bias."""
        here = f"{self._sequence}.{self._next}" + (f".{within}" if within else "")
        self.names |= {f"{here}.{part}": f"{there}.{part}" for part in ("weight", "bias")}
        self._next += 1

    def block(self, there: str, layers: Mapping[str, str]) -> None:
        """The next layer, made of several."""
        for here, name in layers.items():
            for part in ("weight", "bias"):
                self.names[f"{self._sequence}.{self._next}.{here}.{part}"] = f"{there}.{name}.{part}"
        self._next += 1

    def level(
        self, place: str, network: ResnetConfig, count: int, size: int, before: int, multiplier: int
    ) -> int:
        """The blocks of one resolution. Returns the multiplier of its channels."""
        for number in range(count):
            shortcut = {"shortcut": "conv_shortcut"} if number == 0 and before != multiplier else {}
            self.block(f"{place}.resnets.{number}", RESIDUAL | shortcut)
            if size in network.attention_at:
                self.block(f"{place}.attentions.{number}", ATTENTION)
        return multiplier

    def middle(self, part: str, network: ResnetConfig) -> None:
        self.block(f"{part}.mid_block.resnets.0", RESIDUAL)
        if network.attention:
            self.block(f"{part}.mid_block.attentions.0", ATTENTION)
        self.block(f"{part}.mid_block.resnets.1", RESIDUAL)

    def last(self, part: str) -> None:
        self.take(f"{part}.conv_norm_out")
        self._next += 1  # the activation
        self.take(f"{part}.conv_out")

    def end(self, part: str, network: ResnetConfig) -> None:
        self.middle(part, network)
        self.last(part)
