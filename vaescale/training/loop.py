"""The training loop."""

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator

from vaescale import comm
from vaescale.config import Config
from vaescale.data.batch import Batch
from vaescale.errors import Preempted
from vaescale.objectives import Objective
from vaescale.training.clock import Clock
from vaescale.training.guard import Guard, StepReport
from vaescale.training.optimizer import OptimizerConfig, learning_rate
from vaescale.training.step import Precision, step_metrics, train_step
from vaescale.training.strategies.base import Strategy


class TrainingConfig(Config):
    """How long, how precise, and how often something is written."""

    steps: int = Field(gt=0, description="optimizer steps")
    precision: Precision = Field(
        default="bf16",
        description="of the forward pass, weights stay float32; fp16 scales the loss; tf32 is fp32 with a GPU's TF32 products",
    )
    accumulation: int = Field(
        default=1,
        gt=0,
        description="micro-batches per optimizer step; each has its own optimal sigma in the loss",
    )
    channels_last: bool = Field(
        default=False, description="weights and maps as [B, H, W, C] in memory; faster for bf16 convolutions"
    )
    compile: bool = Field(
        default=False, description="torch.compile; with ddp, zero1 and zero2; minutes at the start"
    )
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="of the averaged weights; 0 for none")
    log_every: int = Field(default=10, gt=0)
    evaluate_every: int = Field(default=200, gt=0)
    checkpoint_every: int = Field(default=200, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0, description="the newest so many")
    keep_every: int | None = Field(
        default=None, gt=0, description="besides, those whose step is a multiple of it"
    )
    keep_best: str | None = Field(
        default=None,
        pattern="^val/",
        description="besides, the one with the smallest such metric, as val/neg_elbo_nats",
    )
    resume: Literal["auto", "never"] = "auto"
    max_non_finite: int = Field(
        default=10,
        gt=0,
        description="steps in a row whose loss or gradient is NaN or Inf; they move nothing, then training stops",
    )
    max_rollbacks: int = Field(
        default=0,
        ge=0,
        description="so often it goes back to the last checkpoint instead, with half the learning rate",
    )
    watchdog_seconds: float | None = Field(
        default=900,
        gt=0,
        description="without a sign of life of a process; then training stops and says where; null for no watch",
    )
    compare_replicas_every: int | None = Field(
        default=None, gt=0, description="steps; then every process must hold the same weights, bit for bit"
    )

    @model_validator(mode="after")
    def _measures_what_it_keeps(self) -> "TrainingConfig":
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ValueError(
                f"keep_best needs each checkpoint's own evaluation; make checkpoint_every (={self.checkpoint_every}) a "
                f"multiple of evaluate_every (={self.evaluate_every})"
            )
        return self


class Watcher(Protocol):
    """What happens beside the steps. All ranks call all of it, at the same steps; `done` is the number of steps done."""

    def judged(self, reports: Iterable[StepReport]) -> None:
        """Note which steps were NaN or Inf. Each step is reported once, at the latest while the next one runs."""

    def log(self, done: int, metrics: dict[str, float]) -> None:
        """Write a row of metrics."""

    def evaluate(self, done: int) -> None:
        """Measure the held-out images."""

    def checkpoint(self, done: int) -> None:
        """Save a checkpoint."""

    def asked_to_stop(self) -> bool:
        """Whether this process was asked to stop, for example by a cluster that wants its node back."""


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    evaluate: bool
    checkpoint: bool
    compare: bool

    @classmethod
    def after(cls, done: int, config: TrainingConfig) -> "Due":
        """What is due after `done` steps; after the last step everything is."""
        intervals = (
            *(config.log_every, config.evaluate_every, config.checkpoint_every),
            config.compare_replicas_every,
        )
        return cls(
            *(every is not None and (done % every == 0 or done == config.steps) for every in intervals)
        )


def train(
    strategy: Strategy,
    guard: Guard,
    batches: Iterable[list[Batch]],
    watch: Watcher,
    *,
    config: TrainingConfig,
    optimizer_config: OptimizerConfig,
    objective: Objective,
    seed: int,
    start: int,
    lr_factor: float = 1.0,
) -> None:
    """Train from step `start` to config.steps.

    Raises NotFinite when loss or gradient stay NaN or Inf, and Preempted after a checkpoint when a rank was asked to stop.
    """
    strategy.wrapped.train()
    clock = Clock()
    run_step = partial(train_step, strategy, objective=objective, precision=config.precision, seed=seed)
    for step, micro_batches in enumerate(clock.waiting_for(batches), start=start):
        comm.at_step(step)
        lr = lr_factor * learning_rate(step, optimizer_config, total_steps=config.steps)
        set_learning_rate(strategy.optimizer, lr)
        judge = partial(guard.judge, step=step, asked_to_stop=watch.asked_to_stop())
        result = run_step(micro_batches, judge=judge, scale=guard.scale, step=step)
        done, due = step + 1, Due.after(step + 1, config)
        reports = guard.reports(wait=due.log or due.evaluate or due.checkpoint)
        watch.judged(reports)
        guard.refuse(reports, last_step=config.steps - 1)
        stop = any(report.asked_to_stop for report in reports) and done < config.steps
        if due.compare:
            strategy.compare_replicas()
        if due.log:
            metrics = step_metrics(result, strategy.model) | guard.metrics() | _schedules(objective, step, lr)
            watch.log(done, metrics | clock.metrics(result.global_batch))
        # The state after steps of NaN is neither measured nor saved over a sound checkpoint.
        if due.evaluate and guard.is_well:
            watch.evaluate(done)
        if (due.checkpoint or stop) and guard.is_well:
            watch.checkpoint(done)
        if stop:
            raise _preempted(done, saved=guard.is_well)
        if due.evaluate or due.checkpoint:
            clock.restart()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _schedules(objective: Objective, step: int, lr: float) -> dict[str, float]:
    """The learning rate, and what the objective's schedules are at."""
    return {"train/lr": lr, **{f"train/{name}": value for name, value in objective.progress(step).items()}}


def _preempted(done: int, *, saved: bool) -> Preempted:
    where = "there" if saved else "the last checkpoint"
    return Preempted(f"asked to stop after step {done}; the same command goes on from {where}")
