"""Train a recipe, or describe what training would do: `train` and `describe`.

A run folder has one writer. A start claims it, continues from the newest checkpoint that verifies, and returns to
a checkpoint with a lower learning rate when loss or gradient stay NaN or Inf.
"""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vaescale import comm
from vaescale.data.loader import refuse_small_cache, training_batches
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.workers import Workers, start_server
from vaescale.errors import DataError, NotFinite, Preempted
from vaescale.models.vae import VAE
from vaescale.objectives.base import Objective
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.runs import checkpoint
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint, Keep
from vaescale.runs.identity import identity_tags, refuse_foreign_folder, refuse_other, remember
from vaescale.runs.tracking import Drain
from vaescale.system.console import Progress, say
from vaescale.system.files import write_whole
from vaescale.trained import build_model, in_order
from vaescale.training import launch as backends
from vaescale.training import loop
from vaescale.training.guard import Guard
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer
from vaescale.training.preemption import Preemption
from vaescale.training.recorder import Images, Recorder, restore
from vaescale.training.skips import Skips
from vaescale.training.strategies import STRATEGIES
from vaescale.training.strategies.base import Strategy
from vaescale.training.summary import sum_up
from vaescale.training.watchdog import Watchdog
from vaescale.training.writer import Writer

ROLLBACK_FACTOR = 0.5


def train(
    recipe: Recipe,
    *,
    launch: backends.Launch | None = None,
    processes: int | None = None,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Train to the last step, or continue from the newest checkpoint that verifies. All ranks call it.

    launch: the processes, if they were started before; processes: their number, if another one is to be refused.
    allow_changes: continue a run whose recipe or data have changed. Returns run_dir, step, and the sections of summary.json.
    Raises UserError.
    """
    if recipe.data.workers and recipe.data.cache != "memory":
        start_server()  # it imports torch while this process does
    with backends.launched(launch, processes=processes) as started, ExitStack() as stack:
        parts = build_parts(recipe, started)
        saved = comm.on_main(lambda: _claim(parts, stack, allow_changes=allow_changes))
        steps = recipe.training.steps
        if saved is None or saved.step < steps:
            _train(parts, saved)
        elif comm.is_main():
            say(f"{parts.folder} is trained to step {steps} already; another name or run_dir trains again")
        summary = comm.on_main(lambda: _summary(parts))
    return {"run_dir": str(parts.folder), "step": steps, **summary}


def describe(
    recipe: Recipe, *, launch: backends.Launch | None = None, processes: int | None = None
) -> dict[str, Any]:
    """The resolved recipe, and the plan: data, steps, parameters and memory. Writes nothing. Arguments as of `train`."""
    with backends.launched(launch, processes=processes) as started:
        parts = build_parts(recipe, started)
        return {"recipe": recipe.public(), "plan": _plan(parts)}


@dataclass(frozen=True)
class Parts:
    """What a recipe and a launch make. tags: what identifies the run; checkpoint_shapes: what its checkpoints hold."""

    recipe: Recipe
    launch: backends.Launch
    model: VAE
    objective: Objective
    guard: Guard
    skips: Skips
    train_reader: ShardReader
    val_reader: ShardReader
    plan: Plan
    tags: dict[str, Any]
    checkpoint_shapes: dict[str, checkpoint.Shapes]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run_dir)

    @property
    def layout(self) -> str:
        """How training divides the model: `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`."""
        return backends.layout(self.launch.strategy)


def build_parts(recipe: Recipe, launch: backends.Launch) -> Parts:
    """Build the model and open the data. Writes nothing. Raises UserError and DataError for what cannot work, on all ranks."""
    parts = comm.together(lambda: _build(recipe, launch))
    tags = comm.on_main(
        lambda: identity_tags(
            recipe_hash=recipe.hash,
            data_hash=parts.train_reader.index.data_hash,
            val_data_hash=parts.val_reader.index.data_hash,
            plan_hash=parts.plan.hash,
            world_size=launch.accelerator.num_processes,
            layout=parts.layout,
        )
    )
    return replace(parts, tags=tags)


def _build(recipe: Recipe, launch: backends.Launch) -> Parts:
    """The parts without tags, which the main process alone can know."""
    config, data, device = recipe.training, recipe.data, launch.accelerator.device
    world_size = launch.accelerator.num_processes
    rank_slots(data.global_batch, rank=0, world_size=world_size, accumulation=config.accumulation)
    model = build_model(recipe).to(device)
    train_reader, val_reader = open_reader(data.train, data), open_reader(data.val, data)
    plan = Plan(train_reader.index.shards.samples, data.global_batch, recipe.seed, data.shuffle_block)
    refuse_small_cache(train_reader, plan, data)
    guard = Guard(
        skip_factor=recipe.optimizer.skip_factor,
        clip_norm=recipe.optimizer.clip_norm,
        max_non_finite=config.max_non_finite,
        scaled=config.precision == "fp16",
        device=device,
    )
    return Parts(
        recipe=recipe,
        launch=launch,
        model=model,
        objective=recipe.objective.implement(model),
        guard=guard,
        skips=Skips(epoch_images=len(train_reader), most=data.max_skipped, device=device),
        train_reader=train_reader,
        val_reader=val_reader,
        plan=plan,
        tags={},
        checkpoint_shapes={
            **checkpoint.shapes_of_training(model, ema=config.ema_decay > 0),
            "guard": {"state": ("F64", [len(guard.state.to_tensor())])},
        },
    )


def _plan(parts: Parts) -> dict[str, Any]:
    recipe, config, processes = parts.recipe, parts.recipe.training, parts.launch.accelerator.num_processes
    per_rank = recipe.data.global_batch // processes
    memory = estimate(
        parts.model,
        images=per_rank // config.accumulation,
        ema=config.ema_decay > 0,
        precision=config.precision,
        importance_samples=parts.objective.importance_samples,
        accumulation=config.accumulation,
        layout=parts.layout,
        processes=processes,
    )
    return {
        "layout": parts.layout,
        "processes": processes,
        "device": str(parts.launch.accelerator.device),
        "train_images": len(parts.train_reader),
        "train_shards": len(parts.train_reader.index.shards),
        "val_images": len(parts.val_reader),
        "steps_per_epoch": parts.plan.steps_per_epoch,
        "epochs": round(config.steps / parts.plan.steps_per_epoch, 2),
        "images_per_process_and_step": per_rank,
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        **{f"memory_{name}_bytes": size for name, size in memory.items()},
        "memory_images_bytes": parts.train_reader.memory_bytes + parts.val_reader.memory_bytes,
        **parts.tags,
    }


def _claim(parts: Parts, stack: ExitStack, *, allow_changes: bool) -> Checkpoint | None:
    """Hold the run folder until the stack is closed, and write what training starts from. On the main process only.

    Returns the newest checkpoint that verifies, None in a new folder. Raises UserError and DataError for another run's folder.
    """
    folder, recipe, changes = parts.folder, parts.recipe, list[str]()

    def may_go_on() -> None:
        changes[:] = refuse_foreign_folder(
            folder,
            parts.tags,
            data={"data_hash": recipe.data.train, "val_data_hash": recipe.data.val},
            recipe_changes=lambda: differences(
                load_recipe(folder / run_folder.RECIPE).identity(), recipe.identity()
            ),
            may_resume=recipe.training.resume != "never",
            allow_changes=allow_changes,
        )

    stack.enter_context(run_folder.claimed(folder, may_go_on))
    stack.enter_context(run_folder.explained(folder))
    write_whole(folder / run_folder.RECIPE, recipe.to_yaml().encode())
    run_folder.mend_metrics(folder)
    saved = checkpoint.newest(folder / "checkpoints")
    if saved is not None:
        refuse_other(saved, parts.tags, allow_changes=allow_changes)
        checkpoint.refuse_unfit(saved, parts.checkpoint_shapes)
    step = saved.step if saved else 0
    remember(folder, parts.tags, changes, step=step)
    if changes:  # rows of later steps belong to the recipe before
        factor = float(saved.state().get("lr_factor", 1.0)) if saved else 1.0
        run_folder.append_metrics(folder, step, {run_folder.ROLLBACK: factor})
    if step < recipe.training.steps:
        run_folder.forget_summary(folder, "train", "val")  # the checkpoint of the last step was lost
    return saved


def _train(parts: Parts, saved: Checkpoint | None) -> None:
    """Train to the last step, from a checkpoint or from the recipe's weights."""
    recipe, config, shown = parts.recipe, parts.recipe.training, comm.is_main()
    strategy = _lay_out(parts)
    lr_factor = restore(saved, strategy, parts.guard) if saved else 1.0
    start, checkpoints = saved.step if saved else 0, parts.folder / "checkpoints"
    keep = Keep(config.keep_checkpoints, config.keep_every, config.keep_best)
    with (
        Drain(parts.folder, recipe.tracking, shown=shown),
        Progress(f"train {recipe.name}", config.steps, start=start, shown=shown) as progress,
        Writer(checkpoints, keep) as writer,
        Watchdog(config.watchdog_seconds),
        Preemption(shown=shown) as preemption,
        _alone_with_its_data(writer),
        Workers(parts.val_reader, recipe.data.workers) as workers,
    ):
        held_out = partial(in_order, parts.val_reader, workers=workers)
        recorder = Recorder(
            folder=parts.folder,
            tags=parts.tags,
            images=Images(
                parts.train_reader, parts.val_reader, parts.plan, held_out, recipe.data.max_skipped
            ),
            strategy=strategy,
            guard=parts.guard,
            skips=parts.skips,
            writer=writer,
            progress=progress,
            preemption=preemption,
            seed=recipe.seed,
            keep_best=config.keep_best,
            lr_factor=lr_factor,
        )
        _train_with_rollbacks(parts, recorder, start)
        recorder.wait_for_the_disk()


def _lay_out(parts: Parts) -> Strategy:
    """The model divided over the processes, with its optimizer, in the precision that the recipe names."""
    config, model = parts.recipe.training, parts.model
    backends.set_precision(config.precision)
    needed = checkpoint.num_bytes(parts.checkpoint_shapes)
    comm.on_main(lambda: checkpoint.refuse_too_little_room(parts.folder, needed))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        backends.refuse_to_compile(parts.launch.strategy)
        model.compile()
    build: Callable[[torch.nn.Module], torch.optim.Optimizer] = partial(
        build_optimizer, config=parts.recipe.optimizer
    )
    strategy = STRATEGIES[parts.launch.strategy]
    return strategy(parts.launch.accelerator, model, build, ema_decay=config.ema_decay)


def _train_with_rollbacks(parts: Parts, recorder: Recorder, start: int) -> None:
    most = parts.recipe.training.max_rollbacks
    for rollbacks in itertools.count():
        try:
            _train_from(start, parts, recorder)
            return
        except NotFinite as error:
            recorder.wait_for_the_disk()
            start = _roll_back(error, recorder, left=most - rollbacks)
        except Preempted as error:
            recorder.wait_for_the_disk()
            if recorder.preemption.signal == signal.SIGINT:
                raise KeyboardInterrupt(str(error)) from None
            raise


def _train_from(start: int, parts: Parts, recorder: Recorder) -> None:
    recipe = parts.recipe
    batches = training_batches(
        parts.train_reader,
        parts.plan,
        steps=range(start, recipe.training.steps),
        rank=comm.rank(),
        world_size=parts.launch.accelerator.num_processes,
        accumulation=recipe.training.accumulation,
        workers=recipe.data.workers,
        flip=recipe.data.flip,
    )
    with closing(batches):
        loop.train(
            recorder.strategy,
            parts.guard,
            parts.skips.counting(batches),
            recorder,
            config=recipe.training,
            optimizer_config=recipe.optimizer,
            objective=parts.objective,
            seed=recipe.seed,
            start=start,
            lr_factor=recorder.lr_factor,
        )


def _roll_back(error: NotFinite, recorder: Recorder, *, left: int) -> int:
    """Return to the last checkpoint with a lower learning rate. Returns its step.

    left: how many returns are left. Raises the error if there is none, or no checkpoint.
    """
    saved = comm.on_main(lambda: checkpoint.newest(recorder.folder / "checkpoints"))
    if saved is None or left <= 0:
        raise error
    restore(saved, recorder.strategy, recorder.guard)
    recorder.lr_factor *= ROLLBACK_FACTOR  # not the checkpoint's factor: it may be the same checkpoint again
    if comm.is_main():
        run_folder.append_metrics(recorder.folder, saved.step, {run_folder.ROLLBACK: recorder.lr_factor})
        say(f"{error}; going back to step {saved.step} with {recorder.lr_factor} of the learning rate")
    return saved.step


def _summary(parts: Parts) -> dict[str, Any]:
    recipe = parts.recipe
    sum_up(
        parts.folder,
        name=recipe.name,
        steps=recipe.training.steps,
        group_places=parts.model.group_places,
        tracking=recipe.tracking,
    )
    return run_folder.read_json(parts.folder / run_folder.SUMMARY)


@contextmanager
def _alone_with_its_data(writer: Writer) -> Iterator[None]:
    """End this rank when its data fails on it alone.

    It cannot tell the other ranks, which wait in a collective: it names the fault, finishes a checkpoint that is being written,
    and exits; the launcher ends the others.
    """
    try:
        yield
    except DataError as error:
        if comm.is_known_to_all(error):
            raise
        say(f"vaescale train: rank {comm.rank()}: {error}")
        writer.join()
        os._exit(error.exit_code)
