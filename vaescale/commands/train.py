"""One start of a training run: its parts put together, and what happens beside the steps.

The loop knows steps. This knows the run folder: who may write to it, where training goes on, what is logged,
evaluated and saved.
"""

import itertools
import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vaescale import comm, figures
from vaescale.commands.identity import refuse_foreign_folder, refuse_other, remember, tags
from vaescale.commands.summary import sum_up
from vaescale.data.batch import Request
from vaescale.data.loader import refuse_small_cache, training_batches
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.reader import open_reader
from vaescale.errors import DataError, NotFinite, Preempted, UserError
from vaescale.evaluation.glimpse import glimpse
from vaescale.evaluation.likelihood import evaluate
from vaescale.objectives.base import Objective
from vaescale.recipe import Recipe
from vaescale.runs import checkpoint
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Keep
from vaescale.runs.tracking import Drain
from vaescale.system.console import Progress, say
from vaescale.system.files import write_whole
from vaescale.system.host import system_metrics
from vaescale.trained import build_model, in_order
from vaescale.training import launch as backends
from vaescale.training.guard import Guard
from vaescale.training.loop import Watchers, train
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer
from vaescale.training.preemption import Preemption
from vaescale.training.skips import Skips
from vaescale.training.strategies import STRATEGIES
from vaescale.training.watchdog import Watchdog
from vaescale.training.writer import Writer

ROLLBACK_FACTOR = 0.5
GLIMPSED = 8  # images in the picture of each evaluation


class Session:
    """A recipe on this many processes. Building it reads the data's index and refuses what cannot work."""

    def __init__(self, recipe: Recipe, launch: backends.Launch, *, allow_changes: bool = False) -> None:
        """allow_changes: go on in the folder of a run whose recipe or data were others."""
        self.recipe, self.accelerator, self.folder = recipe, launch.accelerator, Path(recipe.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        self._strategy_kind, self._allow_changes = launch.strategy, allow_changes
        self._lr_factor, self._told_non_finite = 1.0, -1
        self._measured: tuple[int, dict[str, float]] = (0, {})
        comm.together(self._open_parts)
        self._tags = comm.on_main(self._find_tags)

    def _open_parts(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        world_size, accumulation = accelerator.num_processes, recipe.training.accumulation
        rank_slots(recipe.data.global_batch, rank=0, world_size=world_size, accumulation=accumulation)
        self.model = build_model(recipe).to(accelerator.device)
        self.train_reader = open_reader(recipe.data.train, recipe.data)
        self.val_reader = open_reader(recipe.data.val, recipe.data)
        shard_samples = self.train_reader.index.shards.samples
        self.plan = Plan(shard_samples, recipe.data.global_batch, recipe.seed, recipe.data.shuffle_block)
        refuse_small_cache(self.train_reader, self.plan, recipe.data)
        self._skips = Skips(
            epoch_images=len(self.train_reader), most=recipe.data.max_skipped, device=accelerator.device
        )
        self._shapes = checkpoint.shapes_of_training(self.model, ema=recipe.training.ema_decay > 0)
        self.objective: Objective = recipe.objective.implement(self.model)
        self.guard = Guard(
            skip_factor=recipe.optimizer.skip_factor,
            clip_norm=recipe.optimizer.clip_norm,
            max_non_finite=recipe.training.max_non_finite,
            scaled=recipe.training.precision == "fp16",
            device=accelerator.device,
        )

    def describe(self) -> dict[str, Any]:
        """What a dry run prints: the resolved recipe and the plan."""
        recipe = self.recipe
        per_rank = recipe.data.global_batch // self.accelerator.num_processes
        memory = estimate(
            self.model,
            images=per_rank // recipe.training.accumulation,
            ema=recipe.training.ema_decay > 0,
            precision=recipe.training.precision,
            importance_samples=self.objective.importance_samples,
            accumulation=recipe.training.accumulation,
            layout=backends.layout(self._strategy_kind),
            processes=self.accelerator.num_processes,
        )
        plan = {
            "layout": backends.layout(self._strategy_kind),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "train_images": len(self.train_reader),
            "train_shards": len(self.train_reader.index.shards),
            "val_images": len(self.val_reader),
            "steps_per_epoch": self.plan.steps_per_epoch,
            "epochs": round(recipe.training.steps / self.plan.steps_per_epoch, 2),
            "images_per_process_and_step": per_rank,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            **{f"memory_{name}_bytes": size for name, size in memory.items()},
            "memory_images_bytes": self.train_reader.memory_bytes + self.val_reader.memory_bytes,
            **self._tags,
        }
        return {"recipe": recipe.public(), "plan": plan}

    def run(self) -> dict[str, Any]:
        """Train to the last step, or go on from the newest sound checkpoint. All ranks call it.

        Returns run_dir, step, and the sections of summary.json.
        """
        with ExitStack() as stack:

            def claim() -> checkpoint.Checkpoint | None:
                stack.enter_context(run_folder.claimed(self.folder, self._may_go_on))
                stack.enter_context(run_folder.explained(self.folder))
                write_whole(self.folder / run_folder.RECIPE, self.recipe.to_yaml().encode())
                run_folder.mend_metrics(self.folder)
                found = checkpoint.newest(self.checkpoints)
                if found is not None:
                    refuse_other(found, self._tags, allow_changes=self._allow_changes)
                    checkpoint.refuse_unfit(found, self._expected())
                step = found.step if found else 0
                remember(self.folder, self._tags, self._changes, step=step)
                if self._changes:  # what was written of later steps belongs to what was before
                    factor = float(found.state().get("lr_factor", 1.0)) if found else 1.0
                    run_folder.append_metrics(self.folder, step, {run_folder.ROLLBACK: factor})
                if step < self.recipe.training.steps:
                    run_folder.forget_summary(self.folder, "train", "val")  # a checkpoint of the end was lost
                return found

            found = comm.on_main(claim)
            start = 0 if found is None else found.step
            if start < self.recipe.training.steps:
                self._train(found)
            elif comm.is_main():
                say(f"{self.folder} is trained to step {start} already; another name or run_dir trains again")
            comm.on_main(lambda: sum_up(self.folder, self.recipe, self.model.group_places))
            summary = comm.on_main(lambda: run_folder.read_json(self.folder / run_folder.SUMMARY))
        return {"run_dir": str(self.folder), "step": self.recipe.training.steps, **summary}

    def _train(self, found: checkpoint.Checkpoint | None) -> None:
        recipe, shown = self.recipe, comm.is_main()
        backends.set_precision(recipe.training.precision)
        needed = checkpoint.num_bytes(self._expected())
        comm.on_main(lambda: checkpoint.refuse_too_little_room(self.folder, needed))
        if recipe.training.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.training.compile:
            backends.refuse_to_compile(self._strategy_kind)
            self.model.compile()
        self._strategy = STRATEGIES[self._strategy_kind](
            self.accelerator,
            self.model,
            partial(build_optimizer, config=recipe.optimizer),
            ema_decay=recipe.training.ema_decay,
        )
        start = self._restore(found)
        keep = Keep(recipe.training.keep_checkpoints, recipe.training.keep_every, recipe.training.keep_best)
        self._progress = Progress(f"train {recipe.name}", recipe.training.steps, start=start, shown=shown)
        with (
            Drain(self.folder, recipe.tracking, shown=shown),
            self._progress,
            Writer(self.checkpoints, keep) as self._writer,
            Watchdog(recipe.training.watchdog_seconds),
            Preemption(shown=shown) as self._preemption,
            alone_with_its_data(self._writer),
        ):
            for rollbacks in itertools.count():
                try:
                    self._train_from(start)
                    break
                except NotFinite as error:
                    start = self._roll_back(error, left=recipe.training.max_rollbacks - rollbacks)
                except Preempted as error:
                    self._wait_for_the_disk()
                    if self._preemption.signal == signal.SIGINT:
                        raise KeyboardInterrupt(str(error)) from None
                    raise
            self._wait_for_the_disk()

    def _train_from(self, start: int) -> None:
        recipe = self.recipe
        batches = training_batches(
            self.train_reader,
            self.plan,
            steps=range(start, recipe.training.steps),
            rank=comm.rank(),
            world_size=self.accelerator.num_processes,
            accumulation=recipe.training.accumulation,
            workers=recipe.data.workers,
            flip=recipe.data.flip,
        )
        with closing(batches):
            train(
                self._strategy,
                self.guard,
                self._skips.counting(batches),
                Watchers(self._judged, self._log, self._evaluate, self._checkpoint, self._asked_to_stop),
                config=recipe.training,
                optimizer_config=recipe.optimizer,
                objective=self.objective,
                seed=recipe.seed,
                start=start,
                lr_factor=self._lr_factor,
            )

    def _roll_back(self, error: NotFinite, *, left: int) -> int:
        """Go back to the last checkpoint with a lower learning rate. Returns its step; raises the error when there is none,
        or when it was done often enough.
        """
        self._wait_for_the_disk()
        found = comm.on_main(lambda: checkpoint.newest(self.checkpoints))
        if found is None or left <= 0:
            raise error
        factor = ROLLBACK_FACTOR * self._lr_factor  # not the checkpoint's: it may be the same one again
        start = self._restore(found)
        self._lr_factor = factor
        if comm.is_main():
            run_folder.append_metrics(self.folder, start, {run_folder.ROLLBACK: factor})
            say(f"{error}; going back to step {start} with {self._lr_factor} of the learning rate")
        return start

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        metrics |= self._skips.metrics()
        if not comm.is_main():
            return
        # A step with NaN moved nothing; its numbers are no numbers.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        run_folder.append_metrics(self.folder, step, metrics | system_metrics())
        bound = "neg_profile_elbo" if self.model.likelihood.reads_x else "neg_elbo"
        nats = metrics.get(f"train/{bound}_nats", math.nan)
        note = f"{bound} {nats:.2f} nats"
        note += f"  sigma {metrics['train/sigma']:.4f}" if "train/sigma" in metrics else ""
        self._progress.update(step, f"{note}  {metrics['perf/images_per_second']:.0f} images/s")

    def _evaluate(self, step: int) -> None:
        batches = in_order(self.val_reader, workers=self.recipe.data.workers)
        with self._strategy.averaged():
            metrics = evaluate(
                self.model, batches, seed=self.recipe.seed, max_skipped=self.recipe.data.max_skipped
            )
            first = self.val_reader.__getitems__(
                Request(np.arange(min(GLIMPSED, len(self.val_reader))), refill=False)
            )
            usable = first.images[first.usable]
            rows = glimpse(self.model, usable, seed=self.recipe.seed) if len(usable) else []
        self._measured = (step, {f"val/{name}": value for name, value in metrics.items()})
        keep_best = self.recipe.training.keep_best
        if keep_best and keep_best not in self._measured[1]:
            known = ", ".join(sorted(self._measured[1]))
            raise UserError(f"training.keep_best is {keep_best!r}; what is measured here: {known}")
        if comm.is_main():
            run_folder.append_metrics(self.folder, step, self._measured[1])
        if comm.is_main() and rows:
            path = self.folder / "figures" / "progress" / f"step-{step:09d}.png"
            figures.picture_rows(path, [(name, row.numpy()) for name, row in rows])

    def _judged(self) -> None:
        """Write down which images a loss or gradient of NaN or Inf came from."""
        last = self.guard.last_non_finite
        if last > self._told_non_finite and comm.is_main():
            numbers = self.plan.samples(last, np.arange(self.plan.global_batch))
            run_folder.append_non_finite(self.folder, last, self.train_reader.keys_of(numbers))
            say(
                f"loss or gradient was NaN or Inf at step {last}; its images: {self.folder / run_folder.NON_FINITE}"
            )
        self._told_non_finite = max(last, self._told_non_finite)

    def _asked_to_stop(self) -> bool:
        return self._preemption.asked() or self._writer.has_failed

    def _checkpoint(self, step: int) -> None:
        self._wait_for_the_disk()  # or two copies would lie in memory
        tensors = self._strategy.state() | {"guard": {"state": self.guard.state.cpu()}}
        measured = self._measured[1] if self._measured[0] == step else {}
        state = self._tags | {"lr_factor": self._lr_factor, "metrics": measured}
        comm.on_main(lambda: self._writer.save(step, tensors, state))

    def _wait_for_the_disk(self) -> None:
        """Until the last checkpoint is written, with a sign of life from every rank each second."""
        while comm.on_main(self._writer.is_busy):
            pass
        comm.on_main(self._writer.wait)

    def _restore(self, found: checkpoint.Checkpoint | None) -> int:
        """Load a checkpoint into the parts, on every rank. Returns its step; without one, 0."""
        if found is None:
            return 0
        names = [name for name in self._expected() if name != "guard"]
        self._strategy.load({name: found.tensors(name) for name in names})
        self.guard.load(found.tensors("guard")["state"])
        self._lr_factor = float(found.state().get("lr_factor", 1.0))
        self._told_non_finite = self.guard.last_non_finite
        return found.step

    def _expected(self) -> dict[str, checkpoint.Shapes]:
        """What a checkpoint of this run holds: names, types and shapes, by file."""
        return {**self._shapes, "guard": {"state": ("F64", [len(self.guard.state)])}}

    def _may_go_on(self) -> None:
        self._changes = refuse_foreign_folder(
            self.folder, self.recipe, self._tags, allow_changes=self._allow_changes
        )

    def _find_tags(self) -> dict[str, Any]:
        return tags(
            self.recipe,
            data_hash=self.train_reader.index.data_hash,
            val_data_hash=self.val_reader.index.data_hash,
            plan_hash=self.plan.hash,
            world_size=self.accelerator.num_processes,
            layout=backends.layout(self._strategy_kind),
        )


@contextmanager
def alone_with_its_data(writer: Writer) -> Iterator[None]:
    """A rank whose data fails cannot tell the others, which wait in a collective: it speaks, lets a checkpoint that is being
    written come to its end, and ends itself; the launcher ends the others.
    """
    try:
        yield
    except DataError as error:
        if comm.is_known_to_all(error):
            raise
        say(f"vaescale train: rank {comm.rank()}: {error}")
        writer.join()
        os._exit(error.exit_code)
