"""The bottleneck of a ladder's blocks as one compiled function on a CPU, and which maps it takes. See `bottleneck.cpp`.

torch would call eight operations forward and twice as many backward, each on the whole batch, and keep every convolution's input besides
its output. The function takes maps in torch's usual order. `VAESCALE_NATIVE=0` in the environment switches it off, for a comparison.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vaescale.networks.convolutions import computed_dtype
from vaescale.system import native

DTYPES = (torch.bfloat16, torch.float32)
MOST_CHANNELS, MOST_BY_TILES = 48, 96
"""Of the inner convolutions; the second one for bfloat16 where the function multiplies tiles of it. torch's are faster for more (tools/bench/README.md)."""

SOURCE = Path(__file__).with_name("bottleneck.cpp")


def are_usable() -> bool:
    """Whether this machine has the functions. The first call in a process loads them and may compile them for some seconds."""
    return native.load(SOURCE) is not None


def most_channels(dtype: torch.dtype) -> int:
    """The most channels of the inner convolutions for which the function is used in a precision."""
    by_tiles = dtype == torch.bfloat16 and native.multiplies_tiles() and _library().multiplies_tiles()
    return MOST_BY_TILES if by_tiles else MOST_CHANNELS


def take(x: Tensor, layers: Sequence[nn.Conv2d]) -> bool:
    """Whether the function is used for a map x [B, C, H, W] and these four layers."""
    return (
        type(x) is Tensor  # neither the memory estimate's tensors without values nor an exporter's
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in DTYPES
        and computed_dtype(x) in DTYPES
        and not torch.compiler.is_compiling()
        and all(_is_plain(layer) for layer in layers)
        and are_usable()
        and layers[1].in_channels <= most_channels(computed_dtype(x))
    )


def fit(layers: Sequence[nn.Conv2d], x: Tensor, seen: Tensor | None, *, apart: int, added: bool) -> bool:
    """Whether the maps have the channels that the layers take and return; torch's operations say what does not."""
    beside = 0 if seen is None else seen.shape[1]
    outputs = apart + (x.shape[1] if added else 0)
    return (layers[0].in_channels, layers[3].out_channels) == (x.shape[1] + beside, outputs) and (
        seen is None or (type(seen) is Tensor and (len(seen), *seen.shape[2:]) == (len(x), *x.shape[2:]))
    )


def convolutions(
    layers: Sequence[nn.Conv2d], x: Tensor, seen: Tensor | None = None, *, apart: int, added: bool
) -> tuple[Tensor, Tensor]:
    """The four convolutions of x [B, C, H, W] and `seen` [B, C', H, W], each after a GELU, in the precision of autocast, with a gradient.

    Returns the first `apart` outputs [B, apart, H, W], and the others [B, C, H, W] plus x if `added`; a map without channels is None.
    """
    dtype = computed_dtype(x)
    x = x.to(dtype).contiguous()
    seen = None if seen is None else seen.to(dtype).contiguous()
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    first, second = _Bottleneck.apply(torch.is_grad_enabled(), apart, added, x, seen, *parameters)  # type: ignore[no-untyped-call]
    return first, second


class _Sizes(ctypes.Structure):
    """Of `bottleneck.cpp`."""

    _fields_ = [
        ("images", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("second", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("apart", ctypes.c_int64),
        ("added", ctypes.c_int64),
        ("taps", ctypes.c_int),
    ]


_Parameters = ctypes.c_void_p * 8


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        differentiated: bool,
        apart: int,
        added: bool,
        x: Tensor,
        seen: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        images, first, height, width = x.shape
        parameters = tuple(parameter.detach().float().contiguous() for parameter in parameters)
        inner, _, kernel, _ = parameters[2].shape
        second = 0 if seen is None else seen.shape[1]
        sizes = _Sizes(
            images, height, width, first, second, inner, apart, first if added else 0, kernel * kernel
        )
        library = _library()
        kept = None
        if differentiated and any(ctx.needs_input_grad):
            kept = x.new_empty(library.kept_size(ctypes.byref(sizes)))
        of_apart = x.new_empty(images, apart, height, width) if apart else None
        of_added = torch.empty_like(x) if added else None
        library.forward(
            int(x.dtype == torch.bfloat16),
            ctypes.byref(sizes),
            ctypes.byref(_places(parameters)),
            *map(native.place, (x, seen, of_apart, of_added, kept)),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, seen, kept, *parameters)
        ctx.sizes = sizes
        return of_apart, of_added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dapart: Tensor | None, dadded: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seen, kept, *parameters = ctx.saved_tensors
        dapart, dadded = (dy if dy is None else dy.to(x.dtype).contiguous() for dy in (dapart, dadded))
        dx, dseen = torch.empty_like(x), None if seen is None else torch.empty_like(seen)
        gradients = [torch.empty_like(parameter) for parameter in parameters]
        _library().backward(
            int(x.dtype == torch.bfloat16),
            ctypes.byref(ctx.sizes),
            ctypes.byref(_places(parameters)),
            *map(native.place, (x, seen, dapart, dadded, kept, dx, dseen)),
            ctypes.byref(_places(gradients)),
            torch.get_num_threads(),
        )
        return None, None, None, dx, dseen, *gradients


def _library() -> ctypes.CDLL:
    library = native.loaded(SOURCE)
    library.kept_size.restype = ctypes.c_int64
    return library


def _places(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return _Parameters(*(tensor.data_ptr() for tensor in tensors))


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether a layer's weights are whole and its own: neither divided by DeepSpeed or FSDP2 nor another's."""
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    # Not as attributes: DeepSpeed would gather the weights that it divides.
    own = (dict.get(layer._parameters, name) for name in ("weight", "bias"))
    return all(
        type(parameter) is nn.Parameter and "ds_id" not in vars(parameter) and parameter.shape == expected
        for parameter, expected in zip(own, (shape, shape[:1]), strict=True)
    )
