"""The layers of all networks. A faster form of a layer (such as a convolution as a matrix product) belongs in this module and
keeps the shapes of the parameters, so that checkpoints stay valid.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from vaescale.config import size_text
from vaescale.errors import UserError
from vaescale.networks.batch_norm import GlobalBatchNorm
from vaescale.networks.config import Norm, Standardize
from vaescale.networks.convolutions import Conv2d, ConvTranspose2d
from vaescale.networks.group_norm import GroupNorm

T = TypeVar("T")
LEAST_VALUES = 16  # of an image in a group of GroupNorm
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}


def conv(
    channels: int,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    before: Norm = "none",
) -> nn.Conv2d:
    """Map [B, C, S, S] to [B, width, S / stride, S / stride] with the usual padding; an even kernel needs a stride of 2.

    before: the normalization that follows; see `has_bias`.
    """
    padding = (kernel - 1) // 2 if padding is None else padding
    return Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=has_bias(before))


def standardized(x: Tensor, moments: Standardize | None) -> Tensor:
    """The encoder's input from images in [0, 1]: (x - mean) / sigma, or 2 x - 1 without moments."""
    return 2 * x - 1 if moments is None else (x - moments.mean) / moments.sigma


def deconv(
    channels: int, width: int, kernel: int, *, stride: int = 2, before: Norm = "none"
) -> nn.ConvTranspose2d:
    """Map [B, C, S, S] to [B, width, S * stride, S * stride]. before: as in `conv`."""
    odd = kernel % 2 if stride == 2 else 0
    padding = (kernel - stride + odd) // 2
    return ConvTranspose2d(
        channels,
        width,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=odd,
        bias=has_bias(before),
    )


def has_bias(before: Norm) -> bool:
    """Whether a layer needs biases. Batch normalization subtracts them again: their gradient is 0 but for rounding, which Adam
    would scale to full steps. GroupNorm keeps the differences of the biases within a group.
    """
    return before != "batch"


def norm(
    kind: Norm, width: int, *, places: int, groups: int = 8, exact: bool = False, eps: float = 1e-5
) -> nn.Module:
    """Normalization of [B, width] or [B, width, H, W]. `group` and `none` do not depend on the batch; `batch` uses
    statistics of the global batch.

    places: H W, 1 for a vector. A group of GroupNorm has at least LEAST_VALUES values, in fewer groups than asked for where maps are
    small; where all values of an image are fewer, there is no normalization. exact: GroupNorm has `groups` groups, whatever the map. eps:
    GroupNorm's.
    """
    if kind == "group" and exact:
        return GroupNorm(groups, width, eps=eps)
    if kind == "group" and width * places >= LEAST_VALUES:
        return GroupNorm(num_groups(width, groups, places), width, eps=eps)
    return GlobalBatchNorm(width) if kind == "batch" else nn.Identity()


def normed(
    kind: Norm,
    width: int,
    activation: str,
    *,
    places: int,
    groups: int = 8,
    exact: bool = False,
    eps: float = 1e-5,
) -> tuple[nn.Module, nn.Module]:
    """Two layers, a normalization (see `norm`) and its activation. Normalizations compute it themselves; the second layer is then the
    identity, so that the layers of an nn.Sequential keep their numbers in checkpoints.
    """
    normalization = norm(kind, width, places=places, groups=groups, exact=exact, eps=eps)
    if isinstance(normalization, GroupNorm | GlobalBatchNorm):
        normalization.activation = activation
        return normalization, nn.Identity()
    return normalization, ACTIVATIONS[activation]()


def has_norms(model: nn.Module) -> bool:
    """Whether a model normalizes maps."""
    return any(isinstance(module, GroupNorm | GlobalBatchNorm) for module in model.modules())


def has_batch_norms(model: nn.Module) -> bool:
    """Whether a map depends on the other examples of its batch in training."""
    return any(isinstance(module, GlobalBatchNorm) for module in model.modules())


def num_groups(width: int, most: int, places: int) -> int:
    """The largest number of groups, a divisor of `most` and of the width, whose groups have at least LEAST_VALUES values each.

    The mean and the variance of one or two values are nearly all that there is in them: such a group says almost nothing of the image.
    """
    common = math.gcd(width, most)
    fits = [
        number
        for number in range(1, common + 1)
        if common % number == 0 and width // number * places >= LEAST_VALUES
    ]
    return max(fits, default=1)


def nearest(x: Tensor, factor: int) -> Tensor:
    """Map [B, C, R, R] to [B, C, factor R, factor R] in the dtype of x: each value fills factor^2 places."""
    if not x.is_cuda:
        return interpolate(x, scale_factor=factor, mode="nearest")
    # CUDA's autocast list would make a float32 map of it, to be cast back by the next convolution.
    with torch.autocast("cuda", enabled=False):
        return interpolate(x, scale_factor=factor, mode="nearest")


def spectral(layer: nn.Module) -> nn.Module:
    """Divide the weight of a layer by its largest singular value. Miyato et al. 2018, algorithm 1."""
    normalized: nn.Module = spectral_norm(layer)
    return normalized


observers: list[Callable[[Callable[..., object], tuple[object, ...]], None]] = []
"""Called with each function that is recomputed, and its arguments, before its forward pass."""


def recomputed(function: Callable[..., T], *arguments: object) -> T:
    """Call `function` and recompute its intermediate values in the backward pass, instead of keeping them. Chen et al. 2016.

    The function must not use torch's random generators; `vaescale.noise` depends only on position and may be drawn again.
    """
    for observe in observers:
        observe(function, arguments)
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def refuse_indivisible(image_size: tuple[int, int], factor: int, why: str, otherwise: str) -> None:
    """Raise UserError with the nearest sizes that fit unless height and width are multiples of `factor`."""
    if not any(side % factor for side in image_size):
        return
    below = [side // factor * factor for side in image_size]
    above = [
        side if side % factor == 0 else low + factor for side, low in zip(image_size, below, strict=True)
    ]
    fits = " or ".join(size_text((high, wide)) for high, wide in (below, above) if high and wide)
    raise UserError(f"data.image_size (={size_text(image_size)}) {why}; use {fits}, or {otherwise}")
