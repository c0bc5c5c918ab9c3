"""Convolutions with few outputs as compiled functions on a CPU, and which of them they take. See `few_outputs.cpp`.

Maps are dense as [B, H, W, C]. `VAESCALE_NATIVE=0` in the environment switches them off, for a comparison.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from vaescale.system import native

DTYPES = (torch.bfloat16, torch.float32)
FEW_OUTPUTS = 8
CHANNELS = 32
"""The functions take a multiple of them."""

MANY_CHANNELS = 128
"""From which on torch's gradient of the weights takes longer than one by windows on a processor that multiplies tiles."""

SOURCE = Path(__file__).with_name("few_outputs.cpp")


def have_few(weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether the weights of a convolution, [O, C, k, k], have so few outputs that torch's operations are slow for them."""
    return len(weight) <= FEW_OUTPUTS < weight.shape[1] and stride == (1, 1) and weight.shape[2] > 1


def go_by_windows(weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether the gradient of weights that are not compiled goes by the windows of the output's gradient, which are the smaller ones."""
    return have_few(weight, stride) and (weight.shape[1] >= MANY_CHANNELS or not native.multiplies_tiles())


def take(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether the functions are used for a map x [B, C, H, W], dense as [B, H, W, C], and these weights of its precision."""
    high, wide = weight.shape[2:]
    return (
        have_few(weight, stride)
        and high == wide
        and padding[0] == padding[1]
        and min(x.shape[2:]) + 2 * padding[0] >= high
        and x.shape[1] == weight.shape[1]
        and weight.shape[1] % CHANNELS == 0
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and x.numel() > 0
        and native.load(SOURCE) is not None
        and not (x.dtype == torch.bfloat16 and native.multiplies_tiles())
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The convolution [B, O, H', W'], dense as [B, H', W', O]. No gradient."""
    sizes = _sizes(x, weight, padding)
    y = x.new_empty(len(x), sizes.height + _more(sizes), sizes.width + _more(sizes), len(weight))
    weight = weight.permute(0, 2, 3, 1).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    places = map(native.place, (x, weight, bias, y))
    native.loaded(SOURCE).forward(
        int(x.dtype == torch.bfloat16), ctypes.byref(sizes), *places, torch.get_num_threads()
    )
    return y.permute(0, 3, 1, 2)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of the weights, float32 [O, C, k, k], from that of the outputs, dense as x and of its precision."""
    sizes = _sizes(x, weight, padding)
    gradient = x.new_empty(len(weight), *weight.shape[2:], weight.shape[1], dtype=torch.float32)
    places = map(native.place, (x, dy, gradient))
    native.loaded(SOURCE).weight_gradient(
        int(x.dtype == torch.bfloat16), ctypes.byref(sizes), *places, torch.get_num_threads()
    )
    return gradient.permute(0, 3, 1, 2)


class _Sizes(ctypes.Structure):
    """Of `few_outputs.cpp`."""

    _fields_ = [
        ("images", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("kernel", ctypes.c_int64),
        ("padding", ctypes.c_int64),
    ]


def _sizes(x: Tensor, weight: Tensor, padding: int) -> _Sizes:
    images, channels, height, width = x.shape
    return _Sizes(images, height, width, channels, len(weight), weight.shape[2], padding)


def _more(sizes: _Sizes) -> int:
    """By how much a side grows."""
    return int(2 * sizes.padding - sizes.kernel + 1)
