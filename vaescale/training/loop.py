"""The training loop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from vaescale import comm
from vaescale.data.batch import Batch
from vaescale.errors import Preempted
from vaescale.objectives.base import Objective
from vaescale.training.clock import Clock
from vaescale.training.config import OptimizerConfig, TrainingConfig
from vaescale.training.guard import Guard
from vaescale.training.optimizer import learning_rate
from vaescale.training.step import step_metrics, train_step
from vaescale.training.strategies.base import Strategy


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
