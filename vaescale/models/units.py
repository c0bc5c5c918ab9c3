"""Stored values of images to [0, 1] and back, on the images' device."""

import torch
from torch import Tensor

from vaescale.config import Window
from vaescale.data.forms import DTYPES


def to_unit(images: Tensor, window: Window = Window(), *, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: B008  # a NamedTuple is frozen
    """Stored values to x = (value - low) / (high - low), clipped to [0, 1]. Integers of 16 bits are exact in float32."""
    values = images.to(dtype)
    if window.low:
        values = values - window.low
    x = values / (window.high - window.low)
    return x.clamp(0, 1) if window.clips else x


def to_stored(x: Tensor, window: Window) -> Tensor:
    """Values in [0, 1], clamped, to the stored ones; integers are rounded to the nearest."""
    values = window.low + (window.high - window.low) * x.float().clamp(0, 1)
    return values if window.levels is None else values.round().to(DTYPES[window.dtype])


def mirrored(images: Tensor) -> Tensor:
    """Stored values [..., W] from right to left. torch does not flip uint16, whose bits int16 holds as well."""
    if images.dtype == torch.uint16:
        return images.view(torch.int16).flip(-1).view(torch.uint16)
    return images.flip(-1)


def blank(count: int, example_shape: tuple[int, ...], window: Window, device: torch.device | str) -> Tensor:
    """Images of zeros as they arrive from the reader, [count, *example_shape]."""
    return torch.zeros(count, *example_shape, dtype=DTYPES[window.dtype], device=device)
