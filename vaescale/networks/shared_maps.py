"""Convolutions of maps beside maps that several of them share, such as those of the last frame that is given.

    conv(cat[x, skip]) = conv_x(x) + conv_skip(skip)

A convolution is linear in its channels, so the part of the skip is computed once for all frames that share it, and the maps are not
copied next to each other. The layers have the parameters of torch's for the joined channels.

Legend: B sequences; K draws of each; S steps of time; c maps of each sequence, of which step s has number min(s, c - 1).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vaescale.networks.convolutions import Conv2d, ConvTranspose2d


class SharedConv2d(Conv2d):
    """A convolution of [B K S, C, H, W] and [B, c, C', H, W]."""

    def forward(self, x: Tensor, skip: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        """Map both to [B K S, width, H', W']. steps: S."""
        one, other = torch.split(self.weight, [x.shape[1], skip.shape[2]], dim=1)
        of_skip = self.mapped(skip.flatten(0, 1), other, None)
        return _plus_shared(self.mapped(x, one, self.bias), of_skip, skip.shape[1], steps)


class SharedConvTranspose2d(ConvTranspose2d):
    """A transposed convolution of [B K S, C, H, W] and [B, c, C', H, W]."""

    def forward(self, x: Tensor, skip: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        """Map both to [B K S, width, H', W']. steps: S."""
        one, other = torch.split(self.weight, [x.shape[1], skip.shape[2]], dim=0)
        of_skip = self.mapped(skip.flatten(0, 1), other, None)
        return _plus_shared(self.mapped(x, one, self.bias), of_skip, skip.shape[1], steps)


class Beside(nn.Sequential):
    """Layers of which the first one takes all arguments."""

    def forward(self, *inputs: Any) -> Tensor:
        """The last layer's output."""
        for layer in self:
            inputs = (layer(*inputs),)
        output: Tensor = inputs[0]
        return output


def _plus_shared(x: Tensor, skip: Tensor, maps: int, steps: int) -> Tensor:
    """x [B K S, C, H, W] plus the map of each step, of skip [B c, C, H, W]. It changes x."""
    y: Tensor = _Plus.apply(x, skip, maps, steps)  # type: ignore[no-untyped-call]
    return y


class _Plus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, maps: int, steps: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.sizes = maps, steps, len(skip) // maps
        by_step, by_map = _by_step(x, ctx.sizes), skip.view(-1, 1, maps, *skip.shape[1:])
        by_step[:, :, :maps].add_(by_map)
        by_step[:, :, maps:].add_(by_map[:, :, -1:])
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        maps, _, sequences = ctx.sizes
        by_step = _by_step(dy, ctx.sizes)
        is_last = dy.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if is_last else torch.contiguous_format
        shared = torch.empty(
            (sequences * maps, *dy.shape[1:]), dtype=dy.dtype, device=dy.device, memory_format=order
        )
        by_map = shared.view(sequences, maps, *dy.shape[1:])
        torch.sum(by_step[:, :, : maps - 1], 1, out=by_map[:, : maps - 1])
        torch.sum(by_step[:, :, maps - 1 :], (1, 2), out=by_map[:, maps - 1])
        return dy, shared, None, None


def _by_step(x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """x [B K S, C, H, W] as [B, K, S, C, H, W]."""
    _, steps, sequences = sizes
    return x.view(sequences, -1, steps, *x.shape[1:])
