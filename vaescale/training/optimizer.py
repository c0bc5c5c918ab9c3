"""Adam and AdamW, with the learning rate as a pure function of the step."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from vaescale.config import Config
from vaescale.schedules import SCHEDULES

Beta = Annotated[float, Field(ge=0, lt=1)]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class OptimizerConfig(Config):
    """Kingma & Ba 2015 (adam); Loshchilov & Hutter 2019 (adamw)."""

    kind: Literal["adam", "adamw"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(
        default=0.0, ge=0, le=1, description="of lr, at the last step of the cosine"
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest gradient norm; the loss is in nats per image, so it grows with D",
    )
    skip_factor: float | None = Field(
        default=None,
        gt=1,
        description="skip steps whose gradient norm is so many times the usual one (see training/guard.py); for deep ladders",
    )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, never on biases and norms. Fused, so that a step is skipped by a tensor on
    the device, `found_inf`, and no host waits to know.
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
