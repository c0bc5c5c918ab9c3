"""The convolutional networks of LPIPS: VGG-16 (Simonyan & Zisserman 2015) and AlexNet (Krizhevsky 2014), up to their last compared map.

Weights come from a safetensors file with the names that the `lpips` package gives them (`lpips.LPIPS(net="vgg").state_dict()`):
net.sliceN.I.weight and .bias of the convolutions, linN.model.1.weight of the calibration. See docs/adversarial.md for the command
that writes such a file.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaescale.errors import UserError

# What the authors' code subtracts from images in [-1, 1], and divides by: ImageNet's mean and deviation, on that scale.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Layer(NamedTuple):
    """A convolution with its ReLU. slice, number: those in its name; pool: kernel of the maximum before it, 0 for none; compared: whether its
    map is.
    """

    slice: int
    number: int
    width: int
    kernel: int
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


ALEX = (
    Layer(1, 0, 64, 11, 4, 2, compared=True),
    Layer(2, 3, 192, 5, 1, 2, pool=3, compared=True),
    Layer(3, 6, 384, 3, pool=3, compared=True),
    Layer(4, 8, 256, 3, compared=True),
    Layer(5, 10, 256, 3, compared=True),
)
VGG = (
    Layer(1, 0, 64, 3),
    Layer(1, 2, 64, 3, compared=True),
    Layer(2, 5, 128, 3, pool=2),
    Layer(2, 7, 128, 3, compared=True),
    Layer(3, 10, 256, 3, pool=2),
    Layer(3, 12, 256, 3),
    Layer(3, 14, 256, 3, compared=True),
    Layer(4, 17, 512, 3, pool=2),
    Layer(4, 19, 512, 3),
    Layer(4, 21, 512, 3, compared=True),
    Layer(5, 24, 512, 3, pool=2),
    Layer(5, 26, 512, 3),
    Layer(5, 28, 512, 3, compared=True),
)
KINDS = {
    11: ("alex", ALEX, 32),
    3: ("vgg", VGG, 16),
}  # by the kernel of the first layer; with the smallest image


class Lpips(nn.Module):
    """The maps of images [B, 3, H, W] in [0, 1] that LPIPS compares, and the weights of their channels."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Take the weights. origin: the file, for messages. Raises UserError when they are not those of an LPIPS network."""
        super().__init__()
        first = tensors.get("net.slice1.0.weight")
        kernel = first.shape[-1] if first is not None and first.ndim == 4 else 0
        if kernel not in KINDS:
            raise UserError(
                f"{origin} has no weights of LPIPS with VGG or AlexNet (net.slice1.0.weight); write them as docs/adversarial.md says"
            )
        self.kind, self._layers, self.smallest = KINDS[kernel]
        self.convolutions = nn.ModuleList()
        channels = 3
        for layer in self._layers:
            convolution = nn.Conv2d(
                channels, layer.width, layer.kernel, stride=layer.stride, padding=layer.padding
            )
            name = f"net.slice{layer.slice}.{layer.number}"
            _fill(convolution.weight, tensors, f"{name}.weight", origin)
            assert convolution.bias is not None
            _fill(convolution.bias, tensors, f"{name}.bias", origin)
            self.convolutions.append(convolution)
            channels = layer.width
        compared = [layer.width for layer in self._layers if layer.compared]
        self.calibrations = nn.ParameterList(torch.empty(1, width, 1, 1) for width in compared)
        for number, parameter in enumerate(self.calibrations):
            _fill(parameter, tensors, f"lin{number}.model.1.weight", origin)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The compared maps of images, by the layers' names."""
        x, maps = (2 * x - 1 - self.shift) / self.scale, {}
        for layer, convolution in zip(self._layers, self.convolutions, strict=True):
            if layer.pool:
                x = nn.functional.max_pool2d(x, layer.pool, 2)
            x = convolution(x).relu()
            if layer.compared:
                maps[f"relu{layer.slice}"] = x
        return maps

    def channel_weights(self) -> dict[str, Tensor]:
        """The weight of each channel of a map [1, F, 1, 1], by the layers' names."""
        names = [f"relu{layer.slice}" for layer in self._layers if layer.compared]
        return dict(zip(names, self.calibrations, strict=True))


def _fill(parameter: Tensor, tensors: Mapping[str, Tensor], name: str, origin: str) -> None:
    given = tensors.get(name)
    if given is None or given.shape != parameter.shape or not given.is_floating_point():
        found = "is missing" if given is None else f"is {given.dtype} {list(given.shape)}"
        raise UserError(
            f"{origin}: {name} {found}, an LPIPS network has {list(parameter.shape)} there; write the file as docs/adversarial.md says"
        )
    with torch.no_grad():
        parameter.copy_(given)
