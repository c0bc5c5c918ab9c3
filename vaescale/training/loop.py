"""The training loop: steps, and what is logged, evaluated and saved after them."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vaescale import comm
from vaescale.data.batch import Batch
from vaescale.errors import Preempted
from vaescale.objectives.base import Objective
from vaescale.training.clock import Clock
from vaescale.training.config import OptimizerConfig, TrainingConfig
from vaescale.training.guard import Guard, StepReport
from vaescale.training.optimizer import learning_rate
from vaescale.training.rival import Rival
from vaescale.training.step import step_metrics, train_step
from vaescale.training.strategies.base import Strategy


class Watcher(Protocol):
    """Callbacks of the training loop. All ranks call each at the same steps; `done` is the number of steps done."""

    def judged(self, reports: Iterable[StepReport]) -> None:
        """Record which steps were NaN or Inf. Each step is reported once, at the latest while the next one runs."""

    def log(self, done: int, metrics: dict[str, float]) -> None:
        """Write a row of metrics."""

    def checkpoint(self, done: int) -> None:
        """Save the weights and the training state."""

    def evaluate(self, done: int) -> bool:
        """Measure the held-out images. Returns false if a rank was asked to stop before all were measured."""

    def was_evaluated(self, done: int) -> bool:
        """Whether an earlier start has measured the held-out images at this step."""

    def stepped(self, done: int, first_loss: Tensor | None) -> None:
        """Show that a step is done. first_loss []: this rank's loss of the first step after a start, None at later ones."""

    def has_stalled(self) -> bool:
        """Whether a held-out metric no longer improves, so that training is to end early."""

    def plateau_factor(self) -> float:
        """The factor of the learning rate after the plateaus so far."""

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
        """What is due after `done` steps; after the last step, everything that the recipe asks for."""
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
    rival: Rival | None = None,
    seed: int,
    start: int,
    lr_factor: float = 1.0,
    full_speed: float | None = None,
) -> int:
    """Train from step `start` to config.steps, or until the watcher says that it has stalled. Returns the last step, which is saved.

    full_speed: see Clock. rival: the second player of an adversarial objective. Raises NotFinite when loss or gradient stay NaN or Inf, and Preempted after a checkpoint when a rank was asked to stop.
    """
    if start and Due.after(start, config).evaluate and not watch.was_evaluated(start):
        _evaluate(
            watch, start, is_saved=True
        )  # the last start saved this step and was ended before it was measured
    if watch.has_stalled():
        return start
    strategy.wrapped.train()
    clock = Clock(full_speed)
    run_step = partial(
        train_step, strategy, objective=objective, rival=rival, precision=config.precision, seed=seed
    )
    for step, micro_batches in enumerate(clock.waiting_for(batches), start=start):
        comm.at_step(step)
        lr = lr_factor * learning_rate(step, optimizer_config, total_steps=config.steps)
        lr *= watch.plateau_factor()
        set_learning_rate(strategy.optimizer, lr)
        if rival is not None:
            rival_lr = lr_factor * learning_rate(step, rival.config, total_steps=config.steps)
            set_learning_rate(rival.optimizer, rival_lr)
        judge = partial(guard.judge, step=step, asked_to_stop=watch.asked_to_stop())
        done, due = step + 1, Due.after(step + 1, config)
        # A compiled model has one graph for all steps.
        logged = due.log or config.compile
        result = run_step(micro_batches, judge=judge, scale=guard.scale, step=step, logged=logged)
        reports = guard.reports(wait=due.log or due.evaluate or due.checkpoint)
        watch.judged(reports)
        guard.refuse(reports, last_step=config.steps - 1)
        stop = any(report.asked_to_stop for report in reports) and done < config.steps
        if due.compare:
            strategy.compare_replicas()
            if rival is not None:
                rival.compare_replicas()
        if due.log:
            metrics = step_metrics(result, strategy.model) | guard.metrics() | _schedules(objective, step, lr)
            watch.log(done, metrics | clock.metrics(result.global_batch))
        watch.stepped(done, result.loss if step == start else None)
        # The state after steps of NaN is neither measured nor saved over a sound checkpoint.
        if (due.checkpoint or stop) and guard.is_well:
            watch.checkpoint(done)
        if stop:
            raise _preempted(done, saved=guard.is_well)
        if (
            due.evaluate and guard.is_well
        ):  # after the checkpoint: it may take minutes, in which much can happen
            _evaluate(watch, done, is_saved=due.checkpoint)
            if watch.has_stalled() and done < config.steps:
                if not due.checkpoint:
                    watch.checkpoint(done)
                return done
        if due.evaluate or due.checkpoint:
            clock.restart()
    return config.steps


def _evaluate(watch: Watcher, done: int, *, is_saved: bool) -> None:
    """Measure the held-out images. Raises Preempted, after a checkpoint, when a rank was asked to stop meanwhile."""
    if watch.evaluate(done):
        return
    if not is_saved:
        watch.checkpoint(done)
    raise _preempted(done, saved=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _schedules(objective: Objective, step: int, lr: float) -> dict[str, float]:
    """The learning rate and the current values of the objective's schedules."""
    return {"train/lr": lr, **{f"train/{name}": value for name, value in objective.progress(step).items()}}


def _preempted(done: int, *, saved: bool) -> Preempted:
    where = "there" if saved else "the last checkpoint"
    return Preempted(f"asked to stop after step {done}; the same command continues from {where}")
