"""The training loop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from vaescale import comm
from vaescale.config import Config
from vaescale.data.batch import Batch
from vaescale.errors import Preempted
from vaescale.objectives import Objective
from vaescale.training.clock import Clock
from vaescale.training.guard import Guard
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


@dataclass(frozen=True)
class Watchers:
    """What happens beside the steps, with the number of steps done. All ranks call all of them.

    judged: before anything else is done at a step; asked_to_stop: whether this process was, for example by a cluster that
    wants its node back.
    """

    judged: Callable[[], None]
    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], None]
    checkpoint: Callable[[int], None]
    asked_to_stop: Callable[[], bool]


def train(
    strategy: Strategy,
    guard: Guard,
    batches: Iterable[list[Batch]],
    watch: Watchers,
    *,
    config: TrainingConfig,
    optimizer_config: OptimizerConfig,
    objective: Objective,
    seed: int,
    start: int,
    lr_factor: float = 1.0,
) -> None:
    """Train from step `start` to config.steps. Raises NotFinite when loss or gradient stay NaN or Inf, and Preempted after a
    checkpoint when a rank was asked to stop.
    """
    strategy.wrapped.train()
    clock = Clock()
    for step, micro_batches in enumerate(clock.waiting_for(batches), start=start):
        comm.at_step(step)
        lr = lr_factor * learning_rate(step, optimizer_config, total_steps=config.steps)
        for group in strategy.optimizer.param_groups:
            group["lr"] = lr
        result = train_step(
            strategy,
            micro_batches,
            objective=objective,
            judge=partial(guard.judge, step=step, asked_to_stop=watch.asked_to_stop()),
            scale=guard.scale,
            precision=config.precision,
            seed=seed,
            step=step,
        )
        done = step + 1
        log, evaluate, checkpoint, compare = (
            every is not None and (done % every == 0 or done == config.steps)
            for every in (
                config.log_every,
                config.evaluate_every,
                config.checkpoint_every,
                config.compare_replicas_every,
            )
        )
        stop = guard.was_asked_to_stop() and done < config.steps
        if log or evaluate or checkpoint or stop:
            watch.judged()
            guard.refuse(done, last=done == config.steps)
        if compare:
            strategy.compare_replicas()
        if log:
            metrics = step_metrics(result, strategy.model) | guard.metrics()
            metrics |= {"train/lr": lr} | {f"train/{k}": v for k, v in objective.progress(step).items()}
            watch.log(done, metrics | clock.metrics(result.global_batch))
        # What NaN came from is neither measured nor saved over something good.
        if evaluate and guard.is_well:
            watch.evaluate(done)
        if (checkpoint or stop) and guard.is_well:
            watch.checkpoint(done)
        if stop:
            where = "there" if guard.is_well else "the last checkpoint"
            raise Preempted(f"asked to stop after step {done}; the same command goes on from {where}")
        if evaluate or checkpoint:
            clock.restart()
