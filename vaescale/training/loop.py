"""The training loop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from vaescale import comm
from vaescale.config import Config
from vaescale.data.batch import Batch
from vaescale.models.vae import VAE
from vaescale.objectives import Objective
from vaescale.training.clock import Clock
from vaescale.training.ema import Ema
from vaescale.training.guard import Guard
from vaescale.training.optimizer import OptimizerConfig, learning_rate
from vaescale.training.step import step_metrics, train_step

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingConfig(Config):
    """How long, how precise, and how often something is written."""

    steps: int = Field(gt=0, description="optimizer steps")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: autocast, weights stay fp32"
    )
    accumulation: int = Field(
        default=1,
        gt=0,
        description="micro-batches per optimizer step; each has its own optimal sigma in the loss",
    )
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="of the averaged weights; 0 for none")
    log_every: int = Field(default=10, gt=0)
    evaluate_every: int = Field(default=200, gt=0)
    checkpoint_every: int = Field(default=200, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    resume: Literal["auto", "never"] = "auto"
    max_non_finite: int = Field(
        default=10,
        gt=0,
        description="steps in a row whose loss or gradient is NaN or Inf; they move nothing, then training stops",
    )


@dataclass(frozen=True)
class Trainee:
    """What a step changes: the prepared model and optimizer, the plain model inside, and its average."""

    prepared: torch.nn.Module
    optimizer: torch.optim.Optimizer
    model: VAE
    ema: Ema | None
    guard: Guard


@dataclass(frozen=True)
class Watchers:
    """What happens beside the steps, with the number of steps done. All ranks call all of them."""

    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], None]
    checkpoint: Callable[[int], None]


def train(
    accelerator: "Accelerator",
    trainee: Trainee,
    batches: Iterable[list[Batch]],
    watch: Watchers,
    *,
    config: TrainingConfig,
    optimizer_config: OptimizerConfig,
    objective: Objective,
    seed: int,
    start: int,
) -> None:
    """Train from step `start` to config.steps. Raises TrainingStopped when loss or gradient stay NaN or Inf."""
    trainee.prepared.train()
    clock = Clock()
    for step, micro_batches in enumerate(clock.waiting_for(batches), start=start):
        comm.at_step(step)
        lr = learning_rate(step, optimizer_config, total_steps=config.steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = lr
        result = train_step(
            accelerator,
            trainee.prepared,
            trainee.optimizer,
            micro_batches,
            objective=objective,
            skips=trainee.guard.skips,
            precision=config.precision,
            seed=seed,
            step=step,
            clip_norm=optimizer_config.clip_norm,
        )
        if trainee.ema is not None:
            trainee.ema.update(trainee.model, step)
        done = step + 1
        log, evaluate, checkpoint = (
            done % every == 0 or done == config.steps
            for every in (config.log_every, config.evaluate_every, config.checkpoint_every)
        )
        if log or evaluate or checkpoint:
            trainee.guard.refuse(done, last=done == config.steps)
        if log:
            metrics = step_metrics(result, trainee.model) | trainee.guard.metrics()
            metrics |= {"train/lr": lr} | {f"train/{k}": v for k, v in objective.progress(step).items()}
            watch.log(done, metrics | clock.metrics(result.global_batch))
        # What NaN came from is neither measured nor saved over something good.
        if evaluate and trainee.guard.is_well:
            watch.evaluate(done)
        if checkpoint and trainee.guard.is_well:
            watch.checkpoint(done)
        if evaluate or checkpoint:
            clock.restart()
