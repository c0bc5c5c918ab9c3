"""One start of a training run: its parts put together, and what happens beside the steps.

The loop knows steps. This knows the run folder: who may write to it, where training goes on, what is logged,
evaluated and saved.
"""

import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vaescale
from vaescale import comm
from vaescale.batches import refuse_small_cache, training_batches
from vaescale.console import Progress, say
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.reader import open_reader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import evaluate
from vaescale.figures import group_rates, training_curves
from vaescale.files import write_whole
from vaescale.objectives import build_objective
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.run import build_model, in_order
from vaescale.strategies import STRATEGIES, Strategy
from vaescale.training import backends, checkpoint
from vaescale.training import folder as run_folder
from vaescale.training.guard import Guard
from vaescale.training.loop import Watchers, train
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer
from vaescale.training.skips import Skips
from vaescale.training.tracking import Drain, push


class Session:
    """A recipe on this many processes. Building it reads the data's index and refuses what cannot work."""

    def __init__(self, recipe: Recipe, launch: backends.Launch) -> None:
        self.recipe, self.accelerator, self.folder = recipe, launch.accelerator, Path(recipe.run_dir)
        self._strategy_kind = launch.strategy
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
        self.objective = build_objective(recipe.objective, self.model)
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
        )
        plan = {
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
        return {"recipe": recipe.model_dump(mode="json"), "plan": plan}

    def run(self) -> dict[str, Any]:
        """Train to the last step, or go on from the newest sound checkpoint. All ranks call it.

        Returns run_dir, step, and the sections of summary.json.
        """
        with ExitStack() as stack:

            def claim() -> None:
                self._refuse_foreign_folder()
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_folder.locked(self.folder))
                write_whole(self.folder / run_folder.RECIPE, self.recipe.to_yaml().encode())
                run_folder.mend_metrics(self.folder)

            comm.on_main(claim)
            found = comm.on_main(lambda: checkpoint.newest(self.folder / "checkpoints"))
            start = 0 if found is None else found.step
            comm.together(lambda: self._refuse_other(found))
            if start < self.recipe.training.steps:
                self._train(start, found)
            elif comm.is_main():
                say(f"{self.folder} is trained to step {start} already; another name or run_dir trains again")
            comm.on_main(self._finish)
            summary = comm.on_main(lambda: run_folder.read_json(self.folder / run_folder.SUMMARY))
        return {"run_dir": str(self.folder), "step": self.recipe.training.steps, **summary}

    def _train(self, start: int, found: checkpoint.Checkpoint | None) -> None:
        recipe, world_size = self.recipe, self.accelerator.num_processes
        backends.set_precision(recipe.training.precision)
        self._strategy: Strategy = STRATEGIES[self._strategy_kind](
            self.accelerator,
            self.model,
            partial(build_optimizer, config=recipe.optimizer),
            ema_decay=recipe.training.ema_decay,
        )
        if found is not None:
            self._restore(found)
        batches = training_batches(
            self.train_reader,
            self.plan,
            steps=range(start, recipe.training.steps),
            rank=comm.rank(),
            world_size=world_size,
            accumulation=recipe.training.accumulation,
            workers=recipe.data.workers,
            flip=recipe.data.flip,
        )
        steps, shown = recipe.training.steps, comm.is_main()
        if shown:
            run_folder.write_json(self.folder / run_folder.TAGS, self._tags)
        self._progress = Progress(f"train {recipe.name}", steps, start=start, shown=shown)
        with Drain(self.folder, recipe.tracking, shown=shown), self._progress, alone_with_its_data():
            train(
                self._strategy,
                self.guard,
                self._skips.counting(batches),
                Watchers(self._log, self._evaluate, self._checkpoint, lambda: False),
                config=recipe.training,
                optimizer_config=recipe.optimizer,
                objective=self.objective,
                seed=recipe.seed,
                start=start,
            )

    def _finish(self) -> None:
        """Sum up the run from its folder, once it is trained: the start that finished it may have been killed."""
        summary = run_folder.read_json(self.folder / run_folder.SUMMARY)
        curves = self.folder / "figures" / "curves.png"
        if summary.get("train", {}).get("step") == self.recipe.training.steps and curves.is_file():
            return
        rows = run_folder.read_metrics(self.folder)
        training_curves(curves, rows, title=self.recipe.name)
        if len(places := self.model.group_places) > 1:
            labels = [
                f"{number:02d}  {math.isqrt(count)}x{math.isqrt(count)}"
                for number, count in enumerate(places)
            ]
            group_rates(curves.with_name("groups.png"), rows, labels, title=self.recipe.name)
        for section in ("train", "val"):
            prefix = f"{section}/"
            last = next((row for row in reversed(rows) if f"{section}/mse" in row), None)
            if last is None:  # somebody deleted the metrics
                continue
            metrics = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
            run_folder.update_summary(self.folder, section, {"step": last["step"], **metrics})
        push(self.folder, self.recipe.tracking, status="FINISHED")

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        metrics |= self._skips.metrics()
        if not comm.is_main():
            return
        # A step with NaN moved nothing; its numbers are no numbers.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        run_folder.append_metrics(self.folder, step, metrics)
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
        if comm.is_main():
            run_folder.append_metrics(
                self.folder, step, {f"val/{name}": value for name, value in metrics.items()}
            )

    def _checkpoint(self, step: int) -> None:
        tensors = self._strategy.state() | {"guard": {"state": self.guard.state}}
        if comm.is_main():
            keep = self.recipe.training.keep_checkpoints
            checkpoint.write(self.folder / "checkpoints", step, tensors, self._tags, keep=keep)

    def _refuse_other(self, found: checkpoint.Checkpoint | None) -> None:
        """Raise UserError when a checkpoint is of another recipe, plan or data set."""
        if found is None:
            return
        for name in ("recipe_hash", "plan_hash", "data_hash"):
            if found.state()[name] != self._tags[name]:
                raise UserError(
                    f"checkpoint {found.folder} has another {name}; choose another name or run_dir"
                )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        """Load a checkpoint into the parts, on every rank."""
        names = ["model", "optimizer", *(["ema"] if self.recipe.training.ema_decay else [])]
        self._strategy.load({name: found.tensors(name) for name in names})
        self.guard.state = found.tensors("guard")["state"].to(self.guard.state)

    def _refuse_foreign_folder(self) -> None:
        """Raise UserError or DataError when the folder holds another run, or something else."""
        path = self.folder / run_folder.RECIPE
        if not path.is_file():
            # A start that was killed early leaves a lock and half-written files, which belong to nobody.
            if self.folder.is_dir() and any(
                p.name != "lock" and not p.name.startswith(".") for p in self.folder.iterdir()
            ):
                raise UserError(
                    f"run_dir {self.folder} holds files but no run; choose another name or run_dir"
                )
            return
        if changed := differences(load_recipe(path).identity(), self.recipe.identity()):
            raise UserError(
                f"run_dir {self.folder} holds a run of another recipe ({'; '.join(changed)}); "
                f"choose another name or run_dir, or delete that folder"
            )
        if self.recipe.training.resume == "never":
            raise UserError(
                f"run_dir {self.folder} holds a run and training.resume is never; choose another name or run_dir"
            )
        before = run_folder.read_json(self.folder / run_folder.TAGS)
        for name, now in (("data_hash", self.recipe.data.train), ("val_data_hash", self.recipe.data.val)):
            if before.get(name, self._tags[name]) != self._tags[name]:
                raise DataError(
                    f"run_dir {self.folder} was made with other data than {now}; choose another name or run_dir"
                )

    def _find_tags(self) -> dict[str, Any]:
        """What identifies a run: in its folder, its checkpoints and MLflow."""
        return {
            "git_revision": git_revision(),
            "recipe_hash": self.recipe.hash,
            "data_hash": self.train_reader.index.data_hash,
            "val_data_hash": self.val_reader.index.data_hash,
            "plan_hash": self.plan.hash,
            "world_size": self.accelerator.num_processes,
            "vaescale_version": vaescale.__version__,
            "torch_version": str(torch.__version__),
        }


@contextmanager
def alone_with_its_data() -> Iterator[None]:
    """A rank whose data fails cannot tell the others, which wait in a collective: it speaks and ends, and the launcher
    ends them.
    """
    try:
        yield
    except DataError as error:
        if comm.world_size() == 1:
            raise
        say(f"vaescale train: rank {comm.rank()}: {error}")
        os._exit(error.exit_code)


def git_revision() -> str:
    """The commit of the working folder, `-dirty` with changes, or `none` outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"
