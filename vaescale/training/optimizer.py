"""Adam and AdamW, with the learning rate as a pure function of the step."""

from collections.abc import Callable

import torch
from torch import nn

from vaescale.schedules import SCHEDULES
from vaescale.system.uncompiled import Adam, AdamW
from vaescale.training.config import OptimizerConfig

MOST_RISE = 1.1  # of the learning rate between two steps without a word
Optimizers = dict[str, Callable[..., torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {"adam": Adam, "adamw": AdamW}
TORCHS_OWN: Optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, kinds: Optimizers = OPTIMIZERS
) -> torch.optim.Optimizer:
    """Build the optimizer, with weight decay on matrices and kernels only, or on everything with `decay: all`.

    kinds: TORCHS_OWN where their types are asked for. It is fused, so that a tensor on the device, `found_inf`, skips a step and the host does not wait.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def decays(name: str, parameter: nn.Parameter) -> bool:  # a ladder's `biases` are maps
        return config.decay == "all" or (parameter.ndim > 1 and "bias" not in name)

    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed takes no empty one
    return kinds[config.kind](groups, lr=config.lr, betas=config.betas, eps=config.epsilon, fused=True)


def learning_rate(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0. Before `schedule_start` it is that of the schedule's first step."""
    start = config.schedule_start
    if config.warmup_from_zero and step - start < config.warmup_steps:
        return config.lr * max(0, step - start) / config.warmup_steps
    return config.lr * SCHEDULES[config.schedule](
        max(0, step - start),
        total_steps=max(1, total_steps - start),
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_fraction,
    )


def change_of_rate(
    old: tuple[OptimizerConfig, int], new: tuple[OptimizerConfig, int], *, step: int
) -> str | None:
    """A sentence if the learning rate rises at a step at which a run goes on with another recipe, else None.

    old, new: the optimizer's section and the number of steps of the recipe before and after.
    """
    before = learning_rate(min(step, old[1] - 1), old[0], total_steps=old[1])
    after = learning_rate(step, new[0], total_steps=new[1])
    if after <= MOST_RISE * before:
        return None
    return (
        f"the learning rate rises from {before:.3g} to {after:.3g} at step {step}; optimizer.schedule_start={step} begins warm-up "
        "and cosine anew, optimizer.schedule=constant keeps optimizer.lr"
    )
