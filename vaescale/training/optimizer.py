"""Adam and AdamW, with the learning rate as a pure function of the step."""

from collections.abc import Callable

import torch
from torch import nn

from vaescale.schedules import SCHEDULES
from vaescale.training.config import OptimizerConfig

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer, with weight decay on matrices and kernels only, never on biases and norms.

    It is fused, so that a tensor on the device, `found_inf`, skips a step and the host does not wait.
    """
    named = list(model.named_parameters())
    kernels = [p for name, p in named if p.ndim > 1 and "bias" not in name]  # a ladder's `biases` are maps
    others = [p for name, p in named if p.ndim <= 1 or "bias" in name]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.kind](groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0."""
    schedule = SCHEDULES[config.schedule]
    return config.lr * schedule(
        step, total_steps=total_steps, warmup_steps=config.warmup_steps, final_fraction=config.final_fraction
    )
