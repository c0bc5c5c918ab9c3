"""Draws, KL and bounds of a ladder's Gaussians as compiled functions on a CPU, and which maps they take. See `gaussians.cpp`.

They read each map once where torch has some twenty operations, and keep the maps themselves for the backward pass. Values are those of
`posterior.py` but for rounding. `VAESCALE_NATIVE=0` in the environment switches them off, for a comparison.
"""

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaescale.system import native

SOURCE = Path(__file__).with_name("gaussians.cpp")


def take(*maps: Tensor | None) -> bool:
    """Whether the functions are used for these maps, float32 [B, Z, H, W]."""
    given = [x for x in maps if x is not None]
    first = given[0]
    return (
        first.device.type == "cpu"
        and first.dim() == 4
        and first.numel() > 0
        and all(type(x) is Tensor and x.dtype == torch.float32 and x.shape == first.shape for x in given)
        and not torch.compiler.is_compiling()
        and native.load(SOURCE) is not None
    )


def draw(
    mu: Tensor, log_sigma: Tensor, mu_p: Tensor | None, log_sigma_p: Tensor | None, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """The draw z [B, Z, H, W], and KL(q || p) summed over places [B, Z]; p is the standard normal without its map. Differentiable."""
    z, cost = _Draw.apply(mu, log_sigma, mu_p, log_sigma_p, epsilon)  # type: ignore[no-untyped-call]
    return z, cost


def bounded(x: Tensor) -> Tensor:
    """8 tanh(x / 8), differentiable."""
    y: Tensor = _Bounded.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Sizes(ctypes.Structure):
    """Of `gaussians.cpp`."""

    _fields_ = [("images", ctypes.c_int64), ("channels", ctypes.c_int64), ("places", ctypes.c_int64)]


class _Map(ctypes.Structure):
    """Of `gaussians.cpp`."""

    _fields_ = [("data", ctypes.c_void_p), ("distance", ctypes.c_int64)]


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *maps: Tensor | None) -> tuple[Tensor, Tensor]:
        dense = tuple(None if x is None else _dense(x) for x in maps)
        mu = dense[0]
        assert mu is not None
        z, cost = mu.new_empty(mu.shape), mu.new_empty(mu.shape[:2])
        _call("draw", mu, *map(_map, dense), native.place(z), native.place(cost))
        ctx.save_for_backward(*dense)
        return z, cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_z: Tensor, of_cost: Tensor) -> tuple[Tensor | None, ...]:
        maps = ctx.saved_tensors
        of_z, of_cost = of_z.contiguous(), of_cost.contiguous()
        mu, *_ = maps
        gradients = [None if x is None else mu.new_empty(mu.shape) for x in maps[:4]]
        _call("draw_backward", mu, *map(_map, maps), *map(native.place, (of_z, of_cost, *gradients)))
        return *gradients, None


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = _dense(x)
        y = x.new_empty(x.shape)
        _call("bounded", x, _map(x), native.place(y))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        of_y = _dense(of_y)
        of_x: Tensor = y.new_empty(y.shape)
        _call("bounded_backward", y, _map(of_y), native.place(y), native.place(of_x))
        return of_x


def _dense(x: Tensor) -> Tensor:
    """x, or a copy if an image's values do not follow each other."""
    _, channels, height, width = x.shape
    follow = x.stride()[1:] == (height * width, width, 1) and (x.stride(0) > 0 or len(x) == 1)
    return x if follow and channels > 0 else x.contiguous()


def _map(x: Tensor | None) -> Any:
    if x is None:
        return ctypes.byref(_Map(None, 0))
    return ctypes.byref(_Map(x.data_ptr(), x.stride(0)))


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    library = native.loaded(SOURCE)
    sizes = _Sizes(*like.shape[:2], math.prod(like.shape[2:]))
    library[name](ctypes.byref(sizes), *arguments, torch.get_num_threads())
