"""Optimizers and DistributedDataParallel without torch's compiler, which torch would import for nothing, for about a second at every start, and safe for any memory format.

Some functions of torch are excluded from compilation. They import the compiler at their first call, to say so to it, whether anything is compiled
or not (`torch._compile`, `torch.optim.optimizer`, torch 2.13). DistributedDataParallel also asks it for a setting. DeepSpeed and FSDP2 import it, too.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
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
_COMPILER = "torch._dynamo"
_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.Adam.step)  # AdamW has the same one


def checkpoint_uncompiled() -> None:
    """Let activation checkpointing work without the compiler. For a process whose models are not compiled."""
    _call_as_they_are(_CHECKPOINTS)


@contextmanager
def parallel_uncompiled() -> Iterator[None]:
    """Let a DistributedDataParallel be built in the block, and all of the process run later, without the compiler. Not for models that are compiled."""
    if _COMPILER in sys.modules:
        yield
        return
    forward: Any = DistributedDataParallel._inside_ddp_forward
    _call_as_they_are((forward,))
    compiler: Any = _StandIn(_COMPILER)
    compiler.utils = _StandIn(f"{_COMPILER}.utils")
    compiler.utils.get_optimize_ddp_mode = lambda: "ddp_optimizer"  # the compiler's default
    torch._dynamo = compiler
    try:
        yield
    finally:
        if torch.__dict__.get("_dynamo") is compiler:
            del torch._dynamo


class _StandIn(ModuleType):
    """In place of a module, which is imported as soon as it is asked for something that was not set here."""

    def __getattr__(self, name: str) -> Any:
        """The module's attribute."""
        return getattr(importlib.import_module(self.__name__), name)


class _InOrder(Optimizer):
    """Adam whose fused update on a CPU gets weights, gradients and moments as dense views of one order.

    torch's (2.13) goes over their memory, whatever its order: where a gradient has another memory format than its weight, it moves other weights than
    those of the gradient (findings/torch_fused_optimizers_mix_up_layouts.sh). It also copies each gradient that is [B, H, W, C].
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
                gradients[place] = gradient.permute(order).contiguous()  # a copy only in another order
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
