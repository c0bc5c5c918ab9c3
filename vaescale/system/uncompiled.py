"""Optimizers without torch's compiler, which torch would import for nothing, for about a second at every start, and which go over numbers in their own order.

Some functions of torch are excluded from compilation. They import the compiler at their first call, to say so to it, whether anything is compiled
or not (`torch._compile`, `torch.optim.optimizer`, torch 2.13). DistributedDataParallel imports it too, and so do DeepSpeed and FSDP2.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import checkpoint

_MARK = "__dynamo_disable"
_OPTIMIZERS: tuple[Callable[..., Any], ...] = (
    Optimizer.add_param_group,
    Optimizer.zero_grad,
    Optimizer.state_dict,
    Optimizer.load_state_dict,
)
_CHECKPOINTS: tuple[Callable[..., Any], ...] = (
    checkpoint.checkpoint,
    checkpoint._run_fn_with_dynamo_disabled,
)
_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.Adam.step)  # AdamW has the same one


def checkpoint_uncompiled() -> None:
    """Let activation checkpointing work without the compiler. For a process whose models are not compiled."""
    _call_as_they_are(_CHECKPOINTS)


class _InOrder(Optimizer):
    """torch's fused update on a CPU goes over four tensors as they lie in memory (2.13). It updates wrong numbers where a gradient lies in another order than its
    weight (findings/torch_fused_optimizers_mix_up_layouts.sh), and copies a gradient [B, H, W, C], whose copy it does not use. So it gets views of one order.
    """

    def _init_group(self, group: Any, weights: Any, gradients: Any, *more: Any) -> Any:
        result = super()._init_group(group, weights, gradients, *more)  # type: ignore[misc]
        for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if weight.device.type != "cpu" or type(gradient) is not Tensor:
                continue
            if weight.is_contiguous():
                if not gradient.is_contiguous():
                    gradients[place] = gradient.contiguous()
                continue
            order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
            if weight.permute(order).is_contiguous():
                gradients[place] = gradient.permute(
                    order
                ).contiguous()  # a view, or a copy of one in another order
                for tensors in (weights, *more[:3]):
                    if tensors:
                        tensors[place] = self._in_order(tensors[place], order)
        return result

    def _in_order(self, tensor: Tensor, order: list[int]) -> Tensor:
        """A dense view of a weight or of one of its moments, which lie in one order; it is kept for the next step."""
        views: dict[int, Tensor] = self.__dict__.setdefault("_views", {})
        view = views.get(id(tensor))
        if view is None or view._base is not tensor or view.data_ptr() != tensor.data_ptr():
            view = views[id(tensor)] = tensor.permute(order)
            assert view.is_contiguous()
        return view


class Adam(_InOrder, torch.optim.Adam):
    """torch's Adam, the same code without the import. It must not be called in what is compiled."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _call_as_they_are(_OPTIMIZERS)
        super().__init__(*arguments, **options)

    def step(self, closure: Any = None) -> Any:
        """Update the weights."""
        with torch.no_grad():
            return _STEP(self, closure)


class AdamW(_InOrder, torch.optim.AdamW):
    """torch's AdamW, the same code without the import. It must not be called in what is compiled."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _call_as_they_are(_OPTIMIZERS)
        super().__init__(*arguments, **options)

    def step(self, closure: Any = None) -> Any:
        """Update the weights."""
        with torch.no_grad():
            return _STEP(self, closure)


def _call_as_they_are(functions: tuple[Callable[..., Any], ...]) -> None:
    for function in functions:
        inner = inspect.unwrap(function)
        if inner is not function and not hasattr(inner, _MARK):
            setattr(inner, _MARK, inner)
