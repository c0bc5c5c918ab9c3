"""The recorder of a run: rows of metrics, evaluations with a picture, checkpoints, and the images of steps of NaN."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaescale import comm, figures
from vaescale.data.batch import Batch, Request
from vaescale.data.mixed_plan import MixedPlan
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.evaluation.glimpse import glimpse
from vaescale.evaluation.likelihood import evaluate, metric_names
from vaescale.figures.config import View
from vaescale.models.vae import VAE
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint, Keep
from vaescale.runs.trainer_status import TrainerStatus
from vaescale.system.console import Progress, clock, say
from vaescale.system.host import system_metrics
from vaescale.training.config import OptimizerConfig, TrainingConfig
from vaescale.training.guard import Guard, StepReport
from vaescale.training.improvement import Watched
from vaescale.training.launch import precision_of_evaluation
from vaescale.training.preemption import Preemption
from vaescale.training.rival import FILES, Rival
from vaescale.training.skips import Skips
from vaescale.training.strategies.base import Strategy
from vaescale.training.writer import Writer

GLIMPSED = 8  # images in the picture of each evaluation
MOST_NAMED_STEPS = 20  # steps of NaN that are named on stderr


class Images(NamedTuple):
    """The images of a run. held_out: returns this rank's batches of the held-out images, from the first one at each call; measured:
    their number.
    """

    train: ShardReader
    val: ShardReader
    plan: Plan | MixedPlan
    held_out: Callable[[], Generator[Batch]]
    measured: int
    max_skipped: float


@dataclass
class Recorder:
    """The watcher of the training loop. All ranks call it at the same steps; the main process writes.

    name: the run's, for titles; tags: what identifies the run, saved with each checkpoint; keep: the rule by which checkpoints are kept, beside the one with the
    smallest value of the metric keep_best; watched: the metrics that end training or lower its rate; lowest_rate: the least factor of
    the latter; lr_factor: the factor of the learning rate, which each rollback
    to a checkpoint lowers; view: how pictures show the images; full_speed: images a second at the full rate of the GPUs, None where it is unknown.
    """

    folder: Path
    name: str
    tags: dict[str, Any]
    images: Images
    strategy: Strategy
    rival: Rival | None
    guard: Guard
    skips: Skips
    writer: Writer
    progress: Progress
    status: TrainerStatus
    preemption: Preemption
    seed: int
    keep: Keep
    keep_best: str | None
    watched: Watched
    lowest_rate: float
    lr_factor: float = 1.0
    view: View = field(default_factory=View)
    full_speed: float | None = None
    _evaluated: dict[int, float] = field(init=False, default_factory=dict)
    _num_named: int = field(init=False, default=0)
    _non_finite: run_folder.NonFiniteSteps = field(init=False)

    def __post_init__(self) -> None:
        self._non_finite = run_folder.NonFiniteSteps(self.folder)
        if comm.is_main():
            for row in run_folder.read_metrics(self.folder):
                self._note_evaluation(int(row["step"]), row)

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
        note = self._worth(metrics, "train")
        note += f"  sigma {metrics['train/sigma']:.4f}" if "train/sigma" in metrics else ""
        self.progress.update(done, f"{note}  {metrics['perf/images_per_second']:.0f} images/s")

    def _worth(self, metrics: Mapping[str, float], split: str) -> str:
        """The bound of a row of metrics in words, or the squared error of a model without one."""
        model = self.strategy.model
        if not model.has_bound:
            return f"mse {metrics.get(f'{split}/mse', math.nan):.4f}"
        bound = "neg_profile_elbo" if model.likelihood.reads_x else "neg_elbo"
        return f"{bound} {metrics.get(f'{split}/{bound}_nats', math.nan):.2f} nats"

    def stepped(self, done: int, first_loss: Tensor | None) -> None:
        """Show that a step is done, of the first one its loss too: it may take minutes, and the first row is steps away."""
        if self.progress.is_shown:
            self.progress.update(done, "" if first_loss is None else f"loss {float(first_loss):.2f} nats")

    def checkpoint(self, done: int) -> None:
        """Start to write a checkpoint."""
        self.wait_for_the_disk()  # otherwise memory would hold two copies
        tensors = self.strategy.state() | (self.rival.state() if self.rival else {})
        tensors |= {"guard": {"state": self.guard.state.to_tensor().cpu()}}
        state = self.tags | {"lr_factor": self.lr_factor} | self.watched.state()
        comm.on_main(lambda: self.writer.save(done, tensors, state, keep=self._keep()))

    def evaluate(self, done: int) -> bool:
        """Measure the held-out images with the averaged weights, as `vaescale evaluate` does, and draw a few of them.

        Returns false, and records nothing, if a rank was asked to stop before all were measured.
        """
        images, model = self.images, self.strategy.model
        batches = _UntilAsked(self._shown(images.held_out(), done), self.asked_to_stop)
        with self.strategy.averaged(), precision_of_evaluation():
            metrics = evaluate(model, batches, seed=self.seed, max_skipped=images.max_skipped)
            shown = 0 if batches.was_asked or model.of_latents else min(GLIMPSED, len(images.val))
            numbers = np.arange(shown)
            first = images.val.__getitems__(Request(numbers, refill=False))
            usable, condition = first.images[first.usable], model.condition_of(first.labels, first.vectors)
            condition = None if condition is None else condition[first.usable.to(condition.device)]
            rows = glimpse(model, usable, condition, seed=self.seed) if len(usable) else []
        if batches.was_asked:
            return False
        measured = {f"val/{name}": value for name, value in metrics.items()}
        if comm.is_main():
            run_folder.append_metrics(self.folder, done, measured)
            self.status.update(done, measured)
            self.progress.update(done, f"held-out {self._worth(measured, 'val')}", passing=True)
        if comm.is_main() and rows:
            path = self.folder / "figures" / "progress" / f"step-{done:09d}.png"
            what = "held-out images, their reconstructions, and samples"
            if model.predicted_frames > 1:
                what = "held-out sequences, decoded given the frames before, and a future after the context"
            title = f"{self.name}, step {done}, averaged weights: {what}"
            figures.picture_rows(
                path, [(name, row.numpy()) for name, row in rows], title=title, view=self.view
            )
        self._note_evaluation(done, measured)
        self._watch(done, measured)
        if self.keep_best:
            self.wait_for_the_disk()
            comm.on_main(lambda: self.writer.delete_surplus(done, self._keep()))
        return True

    def _shown(self, batches: Generator[Batch], done: int) -> Generator[Batch]:
        """The batches of an evaluation, each shown when it is done. done: the number of training steps."""
        measured, begun = 0, time.monotonic()
        self.progress.update(done, f"evaluate: 0 of {self.images.measured} held-out images", passing=True)
        with closing(batches):
            for batch in batches:
                yield batch
                measured += len(batch.slots) * comm.world_size()
                number = min(measured, self.images.measured)
                left = (time.monotonic() - begun) / number * (self.images.measured - number)
                note = f"evaluate: {number} of {self.images.measured} held-out images, {clock(left)} left"
                self.progress.update(done, note, passing=True)

    def _watch(self, done: int, measured: Mapping[str, float]) -> None:
        """Add an evaluation to the metrics that are watched. Says where the learning rate falls."""
        before = self.plateau_factor()
        self.watched.add(done, measured)
        if comm.is_main() and self.plateau_factor() < before:
            say(f"step {done}: {self.plateau_factor():g} of optimizer.lr from now on, a plateau")

    def has_stalled(self) -> bool:
        """Whether the metric of training.early_stopping no longer improves."""
        return self.watched.has_stalled

    def plateau_factor(self) -> float:
        """The factor of the learning rate of `schedule: plateau`; 1 of others."""
        return self.watched.lr_factor(self.lowest_rate)

    def was_evaluated(self, done: int) -> bool:
        """Whether metrics.jsonl has a row of held-out images at this step."""
        return comm.on_main(lambda: done in self._evaluated)

    def asked_to_stop(self) -> bool:
        """Whether this process got a signal, or cannot write its checkpoints."""
        return self.preemption.asked() or self.writer.has_failed

    def roll_back(self, step: int, lr_factor: float) -> None:
        """Record that training goes on from an earlier step, with another factor of the learning rate."""
        self.lr_factor = lr_factor
        self._evaluated = {done: value for done, value in self._evaluated.items() if done <= step}
        if comm.is_main():
            run_folder.append_metrics(self.folder, step, {run_folder.ROLLBACK: lr_factor})

    def _note_evaluation(self, done: int, row: Mapping[str, float]) -> None:
        if any(name.startswith("val/") for name in row):
            self._evaluated[done] = row.get(self.keep_best or "", math.nan)

    def _keep(self) -> Keep:
        return self.keep._replace(measured=dict(self._evaluated))

    def wait_for_the_disk(self) -> None:
        """Wait until the last checkpoint is written, with a heartbeat of every rank each second."""
        while comm.on_main(self.writer.is_busy):
            pass
        comm.on_main(self.writer.wait)


def refuse_unknown_metric(model: VAE, config: TrainingConfig, optimizer: OptimizerConfig) -> None:
    """Raise UserError where a metric that the recipe names is none of the model's evaluations."""
    known = sorted(f"val/{name}" for name in metric_names(model))
    stopping, plateau = config.early_stopping, optimizer.plateau_or_default
    named = {
        "training.keep_best": config.keep_best,
        "training.early_stopping.metric": stopping and stopping.metric,
        "optimizer.plateau.metric": plateau and plateau.metric,
    }
    for key, metric in named.items():
        if metric and metric not in known:
            raise UserError(f"{key} is {metric!r}; the metrics measured are {', '.join(known)}")


class _UntilAsked:
    """Batches until a rank is asked to stop, the first one in any case. All ranks iterate over equally many."""

    def __init__(self, batches: Generator[Batch], asked: Callable[[], bool]) -> None:
        self._batches, self._asked = batches, asked
        self.was_asked = False

    def __iter__(self) -> Iterator[Batch]:
        with closing(self._batches):
            for batch in self._batches:
                yield batch
                self.was_asked = bool(comm.all_reduce_sum(torch.tensor([float(self._asked())])))
                if self.was_asked:
                    return


def restore(saved: Checkpoint, strategy: Strategy, rival: Rival | None, guard: Guard) -> float:
    """Load a checkpoint, on every rank. Returns its lr_factor. A second player that it does not have begins anew."""
    names = ["model", "optimizer", *saved.averages()]
    strategy.load({name: saved.tensors(name) for name in names})
    if rival is not None and saved.has(FILES["model"]):
        rival.restore(saved)
    guard.load(saved.tensors("guard")["state"])
    return float(saved.state().get("lr_factor", 1.0))
