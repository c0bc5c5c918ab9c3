"""Compiled functions for the normalization of maps on a CPU, and which maps they take. See `normalization.cpp`.

They take maps that are dense as [B, H, W, C], which torch's group_norm differentiates ten times more slowly than maps in the usual
order. `VAESCALE_NATIVE=0` in the environment switches them off, for a comparison.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaescale.system import native

DTYPES = (torch.bfloat16, torch.float32)
FEWEST_VALUES = 4096
"""Of an image's map. Not of a batch's: one and several processes shall compute alike."""

ACTS = {None: 0, "silu": 1, "relu": 2, "leaky_relu": 3}
SOURCE = Path(__file__).with_name("normalization.cpp")


def are_usable() -> bool:
    """Whether this machine has the functions. The first call in a process loads them and may compile them for some seconds."""
    return native.load(SOURCE) is not None


def take(x: Tensor) -> bool:
    """Whether the functions are used for a map x [B, C, H, W]."""
    return (
        type(x) is Tensor  # neither the memory estimate's tensors without values nor an exporter's
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in DTYPES
        and len(x) > 0
        and x[0].numel() >= FEWEST_VALUES
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and are_usable()
    )


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, act: str | None) -> Tensor:
    """act(GroupNorm(x)) like x [B, C, H, W], for which `take` holds; with a gradient. act: a key of ACTS."""
    y: Tensor = _GroupNorm.apply(x, weight, bias, groups, eps, act)  # type: ignore[no-untyped-call]
    return y


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, act: str | None
    ) -> Tensor:
        y, moments = torch.empty_like(x), x.new_empty(2, len(x), groups, dtype=torch.float32)
        weight, bias = weight.float(), bias.float()
        settings = (*_sizes(x), groups, weight, bias, ctypes.c_float(eps))
        _call("group_norm_forward", x, act, x, y, *settings, *_halves(moments))
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        dy, dx = _like(dy, x), torch.empty_like(x)
        sums = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
        settings = (*_sizes(x), moments.shape[2], weight, bias, *_halves(moments), *_halves(sums))
        _call("group_norm_backward", x, ctx.act, dy, x, dx, *settings)
        of_bias, of_weight = sums.sum(1).unbind()
        return dx, of_weight, of_bias, None, None, None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of x [B, C, H, W] over the places of each image, float32 [B, C] each."""
    mean, deviations = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    _call("moments", x, False, x, *_sizes(x), mean, deviations)
    return mean, deviations


def affine(x: Tensor, a: Tensor, b: Tensor, act: str | None) -> Tensor:
    """act(a x + b) like x [B, C, H, W]. a, b: float32 [C]."""
    y = torch.empty_like(x)
    _call("affine", x, act, x, y, *_sizes(x), a.contiguous(), b.contiguous(), 0)
    return y


def sums(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, centre: Tensor, act: str | None
) -> tuple[Tensor, Tensor]:
    """Sums of g = dy act'(a x + b) and of g (x - centre) over the places of each image, float32 [B, C]."""
    first, second = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    vectors = (vector.contiguous() for vector in (a, b, centre))
    _call("sums", x, act, _like(dy, x), x, *_sizes(x), *vectors, 0, first, second)
    return first, second


def input_gradient(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, centre: Tensor, p: Tensor, q: Tensor, act: str | None
) -> Tensor:
    """a g + p (x - centre) + q like x, with g = dy act'(a x + b). Vectors: float32 [C]."""
    dx = torch.empty_like(x)
    vectors = (vector.contiguous() for vector in (a, b, centre, p, q))
    _call("input_gradient", x, act, _like(dy, x), x, dx, *_sizes(x), *vectors, 0)
    return dx


def _like(dy: Tensor, x: Tensor) -> Tensor:
    return dy.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    images, channels, height, width = x.shape
    return images, height * width, channels


def _halves(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The places of the two halves of a float32 tensor [2, ...]; views of them would be operations of torch."""
    place = tensor.data_ptr()
    return ctypes.c_void_p(place), ctypes.c_void_p(place + 4 * (tensor.numel() // 2))


def _call(name: str, x: Tensor, act: str | bool | None, *arguments: Tensor | int | Any) -> None:
    """Call a function of the library. act: False for a function without an activation."""
    library = native.load(SOURCE)
    assert library is not None
    codes: list[Any] = [int(x.dtype == torch.bfloat16)]
    if act is not False:
        codes.append(ACTS[act])  # type: ignore[index]
    # Contiguous tensors are kept by the caller until the call returns.
    for argument in arguments:
        if isinstance(argument, Tensor):
            codes.append(native.place(argument))
        else:
            codes.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
    library[name](*codes, torch.get_num_threads())
