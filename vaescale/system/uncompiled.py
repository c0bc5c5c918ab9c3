"""Optimizers without torch's compiler, which torch would import for nothing, for about a second at every start.

Some functions of torch are excluded from compilation. They import the compiler at their first call, to say so to it, whether anything is compiled
or not (`torch._compile`, `torch.optim.optimizer`, torch 2.13). DistributedDataParallel imports it too, and so do DeepSpeed and FSDP2.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
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


class Adam(torch.optim.Adam):
    """torch's Adam, the same code without the import. It must not be called in what is compiled."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _call_as_they_are(_OPTIMIZERS)
        super().__init__(*arguments, **options)

    def step(self, closure: Any = None) -> Any:
        """Update the weights."""
        with torch.no_grad():
            return _STEP(self, closure)


class AdamW(torch.optim.AdamW):
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
