"""torch's convolutions with gradients of weights and biases that a CPU computes faster, where maps are [B, H, W, C].

Weights: the gradient of a convolution is one product of two matrices, once the windows of a map stand in rows. It takes 41 ms where
torch's (2.13, oneDNN) takes 169 for 512 to 1024 channels on 8x8 maps, but more for few weights on large maps. Where there are more than four million
weights, at least half as many as values in the windows, the forward pass and the gradient of the input are products, too, in float32 and, on a
processor that multiplies tiles, in bfloat16. Where few channels come out, the convolution and its weights' gradient are compiled functions
(`few_outputs.py`), or the windows are those of the output's gradient. Biases: the sum over the output's gradient takes a hundredth of the time of
torch's for a transposed convolution. The rest is torch's, but for transposed convolutions with few outputs, where torch's takes as long for 1 as
for 3. Chellapilla, Puri & Simard 2006.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, conv_transpose2d, pad, pixel_shuffle

from vaescale.networks import few_outputs
from vaescale.system import native

MANY_WEIGHTS, MORE_WEIGHTS = 1 << 21, 1 << 22
"""Numbers of weights from which on their gradient is a product, and from which on all three passes are, if the windows have few values."""
MANY_BY_TILES = 1 << 17
"""That for the gradient on a processor that multiplies tiles, if the windows have few values."""
FEW_VALUES, MORE_VALUES = 2, 7
"""The most values of the windows for each weight: for all three passes, and for the gradient of the weights alone."""

MANY_VALUES = 1 << 18
"""Values from which on it pays to copy a view for a product by tiles."""


def computed_dtype(x: Tensor) -> torch.dtype:
    """The precision that autocast would choose for a convolution of x on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Conv2d(nn.Conv2d):
    """torch's, with the same parameters and results."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to torch's output."""
        return self.mapped(x, self.weight, self.bias)

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with these weights, which may be those of some of the channels."""
        x = _ordered_as_weights(x, self)
        y: Tensor
        if not (_is_plain(x, self) and _pays(self)):
            y = self._conv_forward(x, weight, bias)
            return y
        assert isinstance(self.padding, tuple)
        y = _Convolution.apply(  # type: ignore[no-untyped-call]
            *_cast(x, weight, bias), self.stride, self.padding
        )
        return y


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch's, with the same parameters and results."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map [B, C, H, W] to torch's output."""
        if output_size is not None:
            return super().forward(x, output_size)
        return self.mapped(x, self.weight, self.bias)

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution with these weights, which may be those of some of the channels."""
        x = _ordered_as_weights(x, self)
        settings: Any = (self.stride, self.padding, self.output_padding)
        if not _is_plain(x, self):
            more: Any = {"groups": self.groups, "dilation": self.dilation}
            return conv_transpose2d(x, weight, bias, *settings, **more)
        y: Tensor = _Transposed.apply(*_cast(x, weight, bias), *settings)  # type: ignore[no-untyped-call]
        return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = (stride, padding), bias is not None
        ctx.by_products, ctx.is_compiled = False, few_outputs.take(x, weight, stride, padding)
        if ctx.is_compiled:
            return few_outputs.convolve(x, weight, bias, padding[0])
        high, wide = _sides(x, weight, stride, padding)
        ctx.by_products = _are_products(len(x) * high * wide, weight)
        if ctx.by_products:
            y = _windows(x, weight.shape[2:], stride, padding) @ _matrix(weight).t()
            return _map(y if bias is None else y + bias, len(x), high, wide)
        return conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.settings
        dx, dweight, dy = _gradients(ctx, dy, x, weight, stride, padding, None)
        if ctx.by_products and ctx.needs_input_grad[0]:
            dx = _folded_product(_rows(dy), weight, x.shape, stride, padding)
        if ctx.needs_input_grad[1] and dweight is None:
            if ctx.is_compiled:
                dweight = few_outputs.weight_gradient(dy, x, weight, padding[0]).to(weight.dtype)
            elif few_outputs.go_by_windows(weight, stride):
                around = weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]
                product = _window_columns(dy, weight.shape[2:], around) @ _rows(x)
                ordered = product.view(len(weight), *weight.shape[2:], -1)
                dweight = ordered.flip(1, 2).permute(0, 3, 1, 2)
            else:
                product = _product(_rows(dy), _windows(x, weight.shape[2:], stride, padding))
                dweight = product.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return dx, dweight, dy.sum((0, 2, 3)) if ctx.biased else None, None, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = (stride, padding, output_padding), bias is not None
        few = weight.shape[1] <= few_outputs.FEW_OUTPUTS and weight.shape[2:] == (4, 4)
        ctx.by_products = _are_products(_places(x), weight)
        if few and (stride, padding, output_padding) == ((2, 2), (1, 1), (0, 0)):
            return _by_corners(x, weight, bias)
        if ctx.by_products:
            around = zip(x.shape[2:], stride, padding, weight.shape[2:], output_padding, strict=True)
            high, wide = (
                (size - 1) * step - 2 * pad + kernel + more for size, step, pad, kernel, more in around
            )
            y = _folded_product(_rows(x), weight, (len(x), weight.shape[1], high, wide), stride, padding)
            return y if bias is None else y + bias[:, None, None]
        return conv_transpose2d(x, weight, bias, stride, padding, output_padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, output_padding = ctx.settings
        dx, dweight, dy = _gradients(ctx, dy, x, weight, stride, padding, output_padding)
        wanted = ctx.by_products and ctx.needs_input_grad[0], ctx.needs_input_grad[1] and dweight is None
        windows = _windows(dy, weight.shape[2:], stride, padding) if any(wanted) else dy
        if wanted[0]:
            dx = _map(windows @ _matrix(weight).t(), len(x), *x.shape[2:])
        if wanted[1]:
            product = _product(_rows(x), windows)
            dweight = product.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return dx, dweight, dy.sum((0, 2, 3)) if ctx.biased else None, None, None, None


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """torch's gradient of x, and that of the weights unless a product is faster; and dy in the order of x.

    output_padding: that of a transposed convolution, or None.
    """
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    transposed = output_padding is not None
    by_product = _is_product(_places(x if transposed else dy), weight) or (
        not transposed and (ctx.is_compiled or few_outputs.go_by_windows(weight, stride))
    )
    wanted = [
        ctx.needs_input_grad[0] and not ctx.by_products,
        ctx.needs_input_grad[1] and not by_product,
        False,
    ]
    if not any(wanted):
        return None, None, dy
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        *(dy, x, weight, None, stride, padding, (1, 1), transposed, output_padding or (0, 0), 1, wanted)
    )
    return dx, dweight, dy


def _by_corners(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution of kernel 4, stride 2 and padding 1, by one of kernel 2 that returns the four pixels between four places.

    Along each axis, out[2 i + 1 + p] = in[i] k[2 + p] + in[i + 1] k[p] with p = 0, 1.
    """
    channels, width = weight.shape[:2]
    pairs = weight.view(channels, width, 2, 2, 2, 2).flip(
        2, 4
    )  # [C, C', from i or i + 1, p, from j or j + 1, q]
    kernel = pairs.permute(1, 3, 5, 0, 2, 4).reshape(4 * width, channels, 2, 2)
    corners = conv2d(x, kernel, None if bias is None else bias.repeat_interleave(4), padding=1)
    y = pixel_shuffle(corners, 2)[:, :, 1:-1, 1:-1]
    return y.contiguous(memory_format=torch.channels_last)


def _are_products(places: int, weight: Tensor) -> bool:
    """Whether all passes are products. places: those of the smaller map, whose windows have `places / len(weight)` values for each weight."""
    pays = weight.dtype.itemsize > 2 or _by_tiles(weight.dtype)  # in half precision by tiles alone
    return pays and weight.numel() >= MORE_WEIGHTS and 0 < places <= FEW_VALUES * len(weight)


def _is_product(places: int, weight: Tensor) -> bool:
    """Whether the gradient of the weights is a product. places: those of the smaller map."""
    if _by_tiles(weight.dtype):
        return weight.numel() >= MANY_BY_TILES and places <= MORE_VALUES * len(weight)
    return weight.numel() >= MANY_WEIGHTS


def _by_tiles(dtype: torch.dtype) -> bool:
    """Whether products of matrices of this precision are products of tiles here."""
    return dtype == torch.bfloat16 and native.multiplies_tiles()


def _places(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def _sides(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the outputs."""
    around = zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    high, wide = ((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in around)
    return high, wide


def _rows(x: Tensor) -> Tensor:
    """A map [B, C, H, W] as [B H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, *sizes: int) -> Tensor:
    """Rows [B H W, C] as a map [B, C, H, W]. sizes: B, H and W."""
    return rows.view(*sizes, -1).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """Weights [O, C, k, k] as [O, kernel places C]."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _product(rows: Tensor, others: Tensor) -> Tensor:
    """`rows.t() @ others`. oneDNN's product of tiles (torch 2.13) takes 53 ms of such a view where it takes 33 with the copy."""
    columns = rows.t()
    if rows.numel() >= MANY_VALUES and _by_tiles(rows.dtype):
        columns = columns.contiguous()
    return columns @ others


def _folded_product(
    rows: Tensor, weight: Tensor, shape: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The map [B, C, H, W] that is the sum of the windows `rows @ _matrix(weight)`, in float32 at least.

    One product for each line of the kernel: its values are added while they are in the processor's cache.
    """
    (images, channels, high, wide), (down, right) = shape, padding
    dtype = torch.promote_types(rows.dtype, torch.float32)
    padded = rows.new_zeros(images, high + 2 * down, wide + 2 * right, channels, dtype=dtype)
    tall, broad = weight.shape[2:]
    lines, columns = (
        (side + 2 * pad - kernel) // step + 1
        for side, pad, kernel, step in zip((high, wide), padding, (tall, broad), stride, strict=True)
    )
    values = rows.new_empty(len(rows), broad * channels)
    windows = values.view(images, lines, columns, broad, channels)
    for i, line in enumerate(torch.split(_matrix(weight), broad * channels, 1)):
        torch.mm(rows, line, out=values)
        for j in range(broad):
            below, beside = i + stride[0] * lines, j + stride[1] * columns
            padded[:, i : below : stride[0], j : beside : stride[1]] += windows[:, :, :, j]
    return padded[:, down : high + down, right : wide + right].to(rows.dtype).contiguous().permute(0, 3, 1, 2)


def _windows(x: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The windows of a convolution of x [B, C, H, W] as rows, [number of windows, kernel places C]."""
    (high, wide), (down, right) = kernel, padding
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
    windows = padded.unfold(1, high, stride[0]).unfold(2, wide, stride[1])  # [B, H', W', C, high, wide]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, high * wide * x.shape[1])


def _window_columns(x: Tensor, kernel: torch.Size, padding: tuple[int, int]) -> Tensor:
    """The windows of a convolution of stride 1 of x [B, C, H, W], few channels, as columns: [C kernel places, number of windows]."""
    (high, wide), (down, right) = kernel, padding
    padded = pad(x, (right, right, down, down)).contiguous()
    lines, columns = padded.shape[2] - high + 1, padded.shape[3] - wide + 1
    windows = padded.unfold(2, lines, 1).unfold(3, columns, 1)  # [B, C, high, wide, H', W']
    return windows.permute(1, 2, 3, 0, 4, 5).reshape(x.shape[1] * high * wide, -1)


def _pays(layer: Conv2d) -> bool:
    """Whether a convolution may have a gradient that is faster here."""
    stride: Any = layer.stride
    many = MANY_BY_TILES if _by_tiles(computed_dtype(layer.weight)) else MANY_WEIGHTS
    return layer.kernel_size != (1, 1) and (
        layer.weight.numel() >= many or few_outputs.have_few(layer.weight, stride)
    )


def _ordered_as_weights(x: Tensor, layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """x as [B, H, W, C] where the weights are, such as the first map of a decoder, which comes from a vector in another order."""
    weight = layer.weight
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _is_plain(x: Tensor, layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether a layer may be computed here: in training on a CPU, of maps that are dense as [B, H, W, C]."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in the precision that autocast would choose."""
    return tuple(tensor if tensor is None else tensor.to(computed_dtype(tensor)) for tensor in tensors)
