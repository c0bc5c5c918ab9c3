"""The recorder of a run: rows of metrics, evaluations with a picture, checkpoints, and the images of steps of NaN."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaescale import comm, figures
from vaescale.data.batch import Batch, Request
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.evaluation.glimpse import glimpse
from vaescale.evaluation.likelihood import evaluate
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint
from vaescale.runs.trainer_status import TrainerStatus
from vaescale.system.console import Progress, say
from vaescale.system.host import system_metrics
from vaescale.training.guard import Guard, StepReport
from vaescale.training.launch import precision_of_evaluation
from vaescale.training.preemption import Preemption
from vaescale.training.skips import Skips
from vaescale.training.strategies.base import Strategy
from vaescale.training.writer import Writer

GLIMPSED = 8  # images in the picture of each evaluation
MOST_NAMED_STEPS = 20  # steps of NaN that are named on stderr


class Images(NamedTuple):
    """The images of a run. held_out: returns this rank's batches of the held-out images, from the first one at each call."""

    train: ShardReader
    val: ShardReader
    plan: Plan
    held_out: Callable[[], Iterable[Batch]]
    max_skipped: float


@dataclass
class Recorder:
    """The watcher of the training loop. All ranks call it at the same steps; the main process writes.

    tags: what identifies the run, saved with each checkpoint; lr_factor: the factor of the learning rate, which each rollback
    to a checkpoint lowers; full_speed: images a second at the full rate of the GPUs, None where it is unknown.
    """

    folder: Path
    tags: dict[str, Any]
    images: Images
    strategy: Strategy
    guard: Guard
    skips: Skips
    writer: Writer
    progress: Progress
    status: TrainerStatus
    preemption: Preemption
    seed: int
    keep_best: str | None
    lr_factor: float = 1.0
    full_speed: float | None = None
    _measured: tuple[int, dict[str, float]] = field(init=False, default=(0, {}))
    _num_named: int = field(init=False, default=0)
    _non_finite: run_folder.NonFiniteSteps = field(init=False)

    def __post_init__(self) -> None:
        self._non_finite = run_folder.NonFiniteSteps(self.folder)

    def judged(self, reports: Iterable[StepReport]) -> None:
        """Record the images of each step whose loss or gradient was NaN or Inf."""
        if not comm.is_main():
            return
        for step in (report.step for report in reports if report.non_finite):
            self._non_finite.append(step, self.images.train.keys_of(self.images.plan.samples(step)))
            if self._num_named < MOST_NAMED_STEPS:
                self._num_named += 1
                is_last = self._num_named == MOST_NAMED_STEPS
                more = "; further steps are only written there" if is_last else ""
                path = self.folder / run_folder.NON_FINITE
                say(f"loss or gradient was NaN or Inf at step {step}; its images: {path}{more}")

    def log(self, done: int, metrics: dict[str, float]) -> None:
        """Write a row of metrics and show the progress."""
        metrics |= self.skips.metrics()
        if not comm.is_main():
            return
        # A step of NaN moves no weights, and its metrics of NaN are left out.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        run_folder.append_metrics(self.folder, done, metrics | system_metrics())
        self.status.update(done, metrics)
        bound = "neg_profile_elbo" if self.strategy.model.likelihood.reads_x else "neg_elbo"
        nats = metrics.get(f"train/{bound}_nats", math.nan)
        note = f"{bound} {nats:.2f} nats"
        note += f"  sigma {metrics['train/sigma']:.4f}" if "train/sigma" in metrics else ""
        self.progress.update(done, f"{note}  {metrics['perf/images_per_second']:.0f} images/s")

    def evaluate(self, done: int) -> None:
        """Measure the held-out images with the averaged weights, as `vaescale evaluate` does, and draw a few of them."""
        images, model = self.images, self.strategy.model
        with self.strategy.averaged(), precision_of_evaluation():
            metrics = evaluate(model, images.held_out(), seed=self.seed, max_skipped=images.max_skipped)
            numbers = np.arange(min(GLIMPSED, len(images.val)))
            first = images.val.__getitems__(Request(numbers, refill=False))
            usable = first.images[first.usable]
            rows = glimpse(model, usable, seed=self.seed) if len(usable) else []
        self._measured = (done, {f"val/{name}": value for name, value in metrics.items()})
        if self.keep_best and self.keep_best not in self._measured[1]:
            known = ", ".join(sorted(self._measured[1]))
            raise UserError(f"training.keep_best is {self.keep_best!r}; the metrics measured are {known}")
        if comm.is_main():
            run_folder.append_metrics(self.folder, done, self._measured[1])
            self.status.update(done, self._measured[1])
        if comm.is_main() and rows:
            path = self.folder / "figures" / "progress" / f"step-{done:09d}.png"
            figures.picture_rows(path, [(name, row.numpy()) for name, row in rows])

    def checkpoint(self, done: int) -> None:
        """Start to write a checkpoint."""
        self.wait_for_the_disk()  # otherwise memory would hold two copies
        tensors = self.strategy.state() | {"guard": {"state": self.guard.state.to_tensor().cpu()}}
        measured = self._measured[1] if self._measured[0] == done else {}
        state = self.tags | {"lr_factor": self.lr_factor, "metrics": measured}
        comm.on_main(lambda: self.writer.save(done, tensors, state))

    def asked_to_stop(self) -> bool:
        """Whether this process got a signal, or cannot write its checkpoints."""
        return self.preemption.asked() or self.writer.has_failed

    def wait_for_the_disk(self) -> None:
        """Wait until the last checkpoint is written, with a heartbeat of every rank each second."""
        while comm.on_main(self.writer.is_busy):
            pass
        comm.on_main(self.writer.wait)


def restore(saved: Checkpoint, strategy: Strategy, guard: Guard) -> float:
    """Load a checkpoint, on every rank. Returns its lr_factor."""
    names = [name for name in ("model", "optimizer", "ema") if saved.has(name)]
    strategy.load({name: saved.tensors(name) for name in names})
    guard.load(saved.tensors("guard")["state"])
    return float(saved.state().get("lr_factor", 1.0))
