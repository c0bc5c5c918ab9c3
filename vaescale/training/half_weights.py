"""Half-precision copies of the weights that a forward pass under autocast uses, made by one operation for all layers.

Autocast would convert each weight and bias by an operation of its own, and again where a block is recomputed in the backward
pass. The copies have the values of autocast's, and the gradients of the weights the same bits. Micikevicius et al. 2018, section
3.1: half-precision copies, float32 master weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

NAMES = ("weight", "bias")
Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class HalfWeights:
    """The copies of a network's convolutions and linear layers, and the hooks that put them in place while a layer runs.

    They are refreshed in each forward pass of the model, and used until the optimizer's step. For layouts in which each process
    holds the weights as whole tensors.
    """

    def __init__(self, model: nn.Module, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks. network: the part of the model that runs under autocast."""
        self._copies: dict[Tensor, Tensor] = {}
        self._are_stale, self._are_used = True, False
        self._layers = [
            layer for layer in network.modules() if isinstance(layer, Layer) and not is_parametrized(layer)
        ]
        for layer in self._layers:
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after, always_call=True)
        model.register_forward_pre_hook(self._begin)
        optimizer.register_step_pre_hook(self._end)

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:  # noqa: ARG002
        # Not by the version of the weights: torch's fused optimizers do not change it.
        self._are_stale = self._are_used = True

    def _end(self, *arguments: Any) -> None:  # noqa: ARG002
        self._are_used = False

    def _before(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        device = arguments[0].device.type
        if not (self._are_used and torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
            return
        if self._are_stale:
            self._refresh(torch.get_autocast_dtype(device))
        for name, weight in _weights(layer):
            layer.__dict__[name] = _Copy.apply(weight, self._copies)  # type: ignore[no-untyped-call]

    def _after(self, layer: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG002
        for name in NAMES:
            layer.__dict__.pop(name, None)

    @torch.no_grad()
    def _refresh(self, dtype: torch.dtype) -> None:
        weights = [weight for layer in self._layers for _, weight in _weights(layer)]
        copies = list(self._copies.values())
        if [(copy.dtype, copy.device) for copy in copies] != [(dtype, weight.device) for weight in weights]:
            copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
        torch._foreach_copy_(copies, weights)
        self._copies = dict(zip(weights, copies, strict=True))
        self._are_stale = False


class _Copy(torch.autograd.Function):
    """A weight's copy, whose gradient is that of the weight in the weight's precision and memory layout.

    The copy is the same tensor at each call, which torch then takes for the output of the newest call; so autograd notices, as for
    every tensor that it saves, when a copy is refreshed between the forward and the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copies: dict[Tensor, Tensor]) -> Tensor:
        ctx.dtype = weight.dtype
        # Otherwise torch would convert first, then copy to the weight's layout.
        ctx.layout = torch.contiguous_format if weight.is_contiguous() else torch.preserve_format
        return copies[weight]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype, memory_format=ctx.layout), None


def _weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name in NAMES:
        weight = layer._parameters[name]
        if weight is not None:
            yield name, weight
