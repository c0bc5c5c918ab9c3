"""Train a recipe, or describe the plan of training: `train` and `describe`.

A run folder has one writer. Training claims it, continues from the newest checkpoint that verifies, and returns to
a checkpoint with a lower learning rate when loss or gradient stay NaN or Inf.
"""

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import InstanceOf

from vaescale import comm
from vaescale.commands.parts import Parts, build_parts, build_rival, drawing_of, lay_out, opening, plan_of
from vaescale.commands.signature import Count, checked
from vaescale.commands.step_time import time_steps as measure_steps
from vaescale.data.loader import training_batches
from vaescale.data.workers import Workers, end_workers, start_server
from vaescale.errors import DataError, NotFinite, Preempted, TrainingStopped, UserError
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.runs import checkpoint, class_table, origins
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint, Keep
from vaescale.runs.identity import refuse_foreign_folder, refuse_other, remember
from vaescale.runs.tracking import Drain
from vaescale.runs.trainer_status import TrainerStatus
from vaescale.system import exit_codes
from vaescale.system.console import Progress, say
from vaescale.system.files import write_whole
from vaescale.trained import in_order
from vaescale.training import launch as backends
from vaescale.training import loop, utilization
from vaescale.training.improvement import watched
from vaescale.training.launcher_settings import refuse_ignored
from vaescale.training.optimizer import change_of_rate
from vaescale.training.preemption import Preemption
from vaescale.training.recorder import Images, Recorder, refuse_unknown_metric, restore
from vaescale.training.summary import draw, sigma_at_the_end, sum_up, went_wrong
from vaescale.training.watchdog import Watchdog
from vaescale.training.writer import Writer

ROLLBACK_FACTOR = 0.5


@checked
def train(
    recipe: InstanceOf[Recipe],
    *,
    launch: InstanceOf[backends.Launch] | None = None,
    processes: Count | None = None,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Train to the last step, or continue from the newest checkpoint that verifies. All ranks call it.

    launch: the processes, if they were started before. processes: the expected number; another number is refused.
    allow_changes: continue a run whose recipe or data have changed. Returns run_dir, step, latents_of or codes_of (the name of the run whose
    latents or codes it models, if any), the sections of summary.json, notes: sentences on what went wrong, and sigma: the sentence on a running
    sigma. Raises UserError.
    """
    refuse_ignored(os.environ, recipe.training, recipe.optimizer)
    if recipe.data.workers and recipe.data.cache != "memory":
        start_server()  # it imports torch while this process does
    watchdog = Watchdog(recipe.training.watchdog_seconds)
    launched = backends.launched(launch, processes=processes, watchdog=watchdog)
    with launched as started, ExitStack() as stack:
        parts = build_parts(recipe, started)
        start = comm.on_main(lambda: _claim(parts, stack, allow_changes=allow_changes))
        steps = min(start.step, recipe.training.steps)
        if start.is_at_the_end:
            if comm.is_main():
                ended = ", where training.early_stopping ended it; raise its patience with --allow-changes, or choose another name or run_dir"
                say(
                    f"{parts.folder} is trained to step {steps} already{ended}"
                    if steps < recipe.training.steps
                    else f"{parts.folder} is trained to step {steps} already; raise training.steps with --allow-changes (and set optimizer.schedule_start={steps} for a schedule of its own), or choose another name or run_dir"
                )
        else:
            steps = _train(parts, start, stack, watchdog)
        is_other = start.is_at_the_end and bool(start.changes)
        summary = comm.on_main(lambda: _summary(parts, steps, is_other=is_other))
    origin = parts.tags.get("latents_of")
    of_latents = {f"{recipe.data.holds}_of": origin["run"]} if origin else {}
    condition = {"condition": recipe.condition.kind} if recipe.condition else {}
    return {"run_dir": str(parts.folder), "step": steps, **of_latents, **condition, **summary}


@checked
def describe(
    recipe: InstanceOf[Recipe],
    *,
    launch: InstanceOf[backends.Launch] | None = None,
    processes: Count | None = None,
    allow_changes: bool = False,
    time_steps: bool = False,
) -> dict[str, Any]:
    """The resolved recipe, and the plan: data, steps, parameters and memory. Writes nothing. The arguments are those of `train`.

    time_steps: also train three steps in memory, and add the seconds of a step and of all. The plan's `starts` says from which step of the run
    folder training would go on, or why it would be refused.
    """
    refuse_ignored(os.environ, recipe.training, recipe.optimizer)
    with backends.launched(launch, processes=processes) as started:
        parts = build_parts(recipe, started)
        plan = plan_of(parts) | {
            "starts": comm.on_main(lambda: _would_start(parts, allow_changes=allow_changes))
        }
        return {"recipe": recipe.public(), "plan": plan | (measure_steps(parts) if time_steps else {})}


class Start(NamedTuple):
    """The start of training in a claimed folder: the newest checkpoint that verifies, or None, and the changes that were accepted.

    is_at_the_end: nothing is left to do but the summary.
    """

    saved: Checkpoint | None
    changes: list[str]
    is_at_the_end: bool

    @property
    def step(self) -> int:
        """The step from which training continues."""
        return self.saved.step if self.saved else 0


def _claim(parts: Parts, stack: ExitStack, *, allow_changes: bool) -> Start:
    """Claim the run folder until the stack is closed, and check that training can go on there. Only the main process calls it.

    Changes nothing but the folder's lock. Raises UserError and DataError for the folder of another run.
    """
    folder, recipe, changes = parts.folder, parts.recipe, list[str]()

    def may_go_on() -> None:
        changes[:] = _accepted_changes(parts, allow_changes=allow_changes)

    stack.enter_context(run_folder.claimed(folder, may_go_on))
    start = _start_of(parts, changes, allow_changes=allow_changes)
    if not start.is_at_the_end:
        refuse_unknown_metric(parts.model, recipe.training, recipe.optimizer)
        checkpoint.refuse_too_little_room(folder, checkpoint.num_bytes(parts.checkpoint_shapes))
    return start


def _accepted_changes(parts: Parts, *, allow_changes: bool) -> list[str]:
    """The changes of recipe and data since the folder's run was last started. Raises UserError and DataError where they are not accepted."""
    folder, recipe = parts.folder, parts.recipe
    perceives = getattr(recipe.objective, "perceives", None)
    perceptual = perceives.features if perceives else None
    return refuse_foreign_folder(
        folder,
        parts.tags,
        data={
            "data_hash": recipe.data.train_words,
            "val_data_hash": recipe.data.val,
            **({"perceptual_hash": perceptual} if perceptual else {}),
        },
        recipe_changes=lambda: differences(
            load_recipe(folder / run_folder.RECIPE).settings(), recipe.settings()
        ),
        shapes=parts.checkpoint_shapes,
        may_resume=recipe.training.resume != "never",
        allow_changes=allow_changes,
    )


def _start_of(parts: Parts, changes: list[str], *, allow_changes: bool) -> Start:
    """Where training goes on in a folder with these changes, from the files alone. Raises UserError for checkpoints of another run."""
    folder, recipe = parts.folder, parts.recipe
    saved = checkpoint.newest(folder / "checkpoints")
    if saved is not None:
        refuse_other(saved, parts.tags, allow_changes=allow_changes)
        checkpoint.refuse_unfit(saved, parts.checkpoint_shapes)
    rows = run_folder.read_metrics(folder)
    at_the_end = saved is not None and (
        saved.step >= recipe.training.steps or _has_stalled(recipe, saved, rows)
    )
    # The start that saved the last step may have been ended before it measured the held-out images.
    last = min(saved.step, recipe.training.steps) if saved else 0
    measured = any(row["step"] >= last and "val/mse" in row for row in rows) or not rows
    return Start(saved, changes, is_at_the_end=at_the_end and measured)


def _would_start(parts: Parts, *, allow_changes: bool) -> str:
    """The words of a dry run on where training would start, or why it would be refused."""
    try:
        changes = _accepted_changes(parts, allow_changes=allow_changes)
        start = _start_of(parts, changes, allow_changes=allow_changes)
    except UserError as error:
        return f"refused: {error}"
    if start.saved is None:
        return f"at step 0, in {parts.folder}"
    if start.is_at_the_end:
        return f"no more: {parts.folder} is trained to step {start.step} already"
    changed = f" with {'; '.join(changes)}" if changes else ""
    return f"from step {start.step}, with the checkpoint {start.saved.folder}{changed}"


def _has_stalled(recipe: Recipe, saved: Checkpoint, rows: list[dict[str, float]]) -> bool:
    """Whether early stopping has ended the run at this checkpoint."""
    state = watched(recipe.training.early_stopping, recipe.optimizer)
    state.resume(saved.state(), saved.step, rows)
    return state.has_stalled


def _begin(parts: Parts, stack: ExitStack, start: Start) -> None:
    """Prepare the files of a claimed folder, once nothing can be refused any more. Only the main process calls it."""
    folder, recipe, saved = parts.folder, parts.recipe, start.saved
    stack.enter_context(run_folder.explained(folder))
    if start.changes and saved:
        before = load_recipe(folder / run_folder.RECIPE)
        old, new = ((one.optimizer, one.training.steps) for one in (before, recipe))
        if sentence := change_of_rate(old, new, step=saved.step):
            say(sentence)
    origins.tell_changes(folder, recipe.sections())
    origins.record(folder, recipe.sections())
    write_whole(folder / run_folder.RECIPE, recipe.to_yaml().encode())
    if parts.classes:
        class_table.write(folder, parts.classes)
    run_folder.mend_metrics(folder)
    remember(folder, parts.tags, start.changes, step=start.step)
    if start.changes:  # rows of later steps were made with the earlier recipe
        factor = float(saved.state().get("lr_factor", 1.0)) if saved else 1.0
        run_folder.append_metrics(folder, start.step, {run_folder.ROLLBACK: factor, run_folder.CHANGED: 1.0})
    run_folder.forget_summary(folder, "train", "val")  # the checkpoint of the last step may have been lost


def _train(parts: Parts, start: Start, stack: ExitStack, watchdog: Watchdog) -> int:
    """Train to the last step, from a checkpoint or from the recipe's weights. Returns the last step."""
    recipe, config, shown = parts.recipe, parts.recipe.training, comm.is_main()
    full_speed = utilization.full_speed(
        parts.model,
        precision=config.precision,
        importance_samples=parts.objective.importance_samples,
        processes=parts.launch.accelerator.num_processes,
    )
    sentence = opening(parts, start.step)  # counts the weights, before a layout divides them
    strategy = lay_out(recipe, parts.launch, parts.model, parts.objective)
    if shown:
        say(sentence)
        for drawing in drawing_of(parts).values():
            say(drawing["words"])
    if parts.beginning and not start.saved and shown:
        say(parts.beginning)
    rival = build_rival(recipe, parts.launch, parts.objective)
    if rival and start.saved and not start.saved.has(checkpoint.OPTIONAL[0]) and shown:
        say(f"{start.saved.folder} has no discriminator; it begins anew at step {start.step}")
    lr_factor = restore(start.saved, strategy, rival, parts.guard) if start.saved else 1.0
    comm.on_main(lambda: _begin(parts, stack, start))
    with (
        Drain(parts.folder, recipe.tracking, shown=shown),
        TrainerStatus(os.environ, config.steps, start=start.step, shown=shown) as status,
        Progress(
            f"train {recipe.name}",
            config.steps,
            unit="steps",
            start=start.step,
            epoch=parts.plan.steps_per_epoch,
            shown=shown,
        ) as progress,
        Writer(parts.folder / "checkpoints") as writer,
        watchdog,
        Preemption(shown=shown) as preemption,
        _alone_with_its_fault(parts.folder, writer),
        Workers(parts.val_reader, recipe.data.workers) as workers,
    ):
        held_out = partial(in_order, parts.val_reader, workers=workers, images=config.evaluate_images)
        measured = min(len(parts.val_reader), config.evaluate_images or len(parts.val_reader))
        recorder = Recorder(
            folder=parts.folder,
            name=recipe.name,
            view=recipe.view,
            tags=parts.tags,
            images=Images(
                parts.train_reader,
                parts.val_reader,
                parts.plan,
                held_out,
                measured,
                recipe.data.max_skipped,
            ),
            strategy=strategy,
            rival=rival,
            guard=parts.guard,
            skips=parts.skips,
            writer=writer,
            progress=progress,
            status=status,
            preemption=preemption,
            seed=recipe.seed,
            keep=Keep(config.keep_checkpoints, config.keep_every),
            keep_best=config.keep_best,
            watched=watched(config.early_stopping, recipe.optimizer),
            lowest_rate=recipe.optimizer.final_fraction,
            lr_factor=lr_factor,
            full_speed=full_speed,
        )
        if start.saved:
            _watch_on(recorder, start.saved)
        last = _train_with_rollbacks(parts, recorder, start.step)
        recorder.wait_for_the_disk()
    if last < config.steps and shown:
        stopping = config.early_stopping
        assert stopping is not None
        say(
            f"training ends at step {last} of {config.steps}: {stopping.metric} has not improved for {stopping.patience} evaluations "
            "(training.early_stopping)"
        )
    return last


def _watch_on(recorder: Recorder, saved: Checkpoint) -> None:
    """Continue from what a checkpoint and its evaluation say of the watched metrics. All ranks call it."""
    rows = comm.on_main(
        lambda: [row for row in run_folder.read_metrics(recorder.folder) if row["step"] == saved.step]
    )
    recorder.watched.resume(saved.state(), saved.step, rows)


def _train_with_rollbacks(parts: Parts, recorder: Recorder, start: int) -> int:
    most = parts.recipe.training.max_rollbacks
    for rollbacks in itertools.count():
        try:
            return _train_from(start, parts, recorder)
        except NotFinite as error:
            recorder.wait_for_the_disk()
            start = _roll_back(error, recorder, left=most - rollbacks)
        except Preempted as error:
            recorder.wait_for_the_disk()
            if recorder.preemption.signal == signal.SIGINT:
                # Who sits before the run wants to see it. A cluster's signal leaves no time for pictures.
                if comm.is_main():
                    draw(parts.folder, name=parts.recipe.name, group_maps=parts.model.group_maps)
                raise KeyboardInterrupt(str(error)) from None
            raise
    raise AssertionError("unreachable: a rollback too many raises")


def _train_from(start: int, parts: Parts, recorder: Recorder) -> int:
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
        augment=recipe.data.augment,
    )
    with closing(batches), backends.compiling() if recipe.training.compile else nullcontext():
        return loop.train(
            recorder.strategy,
            parts.guard,
            parts.skips.counting(batches),
            recorder,
            config=recipe.training,
            optimizer_config=recipe.optimizer,
            objective=parts.objective,
            rival=recorder.rival,
            seed=recipe.seed,
            start=start,
            lr_factor=recorder.lr_factor,
            full_speed=recorder.full_speed,
        )


def _roll_back(error: NotFinite, recorder: Recorder, *, left: int) -> int:
    """Return to the last checkpoint with a lower learning rate. Returns its step.

    left: number of returns that remain. Raises the error if no return remains or no checkpoint exists.
    """
    saved = comm.on_main(lambda: checkpoint.newest(recorder.folder / "checkpoints"))
    if saved is None and left > 0:
        raise NotFinite(f"{error}; training.max_rollbacks has no checkpoint to return to yet") from error
    if saved is None or left <= 0:
        raise error
    restore(saved, recorder.strategy, recorder.rival, recorder.guard)
    _watch_on(recorder, saved)
    # Not the checkpoint's factor: it may be the same checkpoint again.
    recorder.roll_back(saved.step, recorder.lr_factor * ROLLBACK_FACTOR)
    if comm.is_main():
        say(f"{error}; going back to step {saved.step} with {recorder.lr_factor} of the learning rate")
    return saved.step


def _summary(parts: Parts, steps: int, *, is_other: bool) -> dict[str, Any]:
    """The content of summary.json, which is written if it is not there, and notes on what went wrong.

    steps: the last step, which early stopping may have chosen. is_other: whether the folder's run has another recipe.
    """
    recipe, notes, sigma = parts.recipe, list[str](), None
    if not is_other:
        sum_up(
            parts.folder,
            name=recipe.name,
            steps=steps,
            stopped_early=steps < recipe.training.steps,
            group_maps=parts.model.group_maps,
            tracking=recipe.tracking,
        )
        (parts.folder / run_folder.STOPPED).unlink(missing_ok=True)
        rows = run_folder.read_metrics(parts.folder)
        notes, sigma = went_wrong(rows, recipe.likelihood), sigma_at_the_end(rows, recipe.likelihood)
        is_said = sigma is None or any(sentence.startswith(sigma) for sentence in notes)
        for sentence in notes if is_said else [*notes, sigma]:
            say(f"{parts.folder}: {sentence}")
    of_sigma = {} if sigma is None else {"sigma": sigma}
    return {**run_folder.read_json(parts.folder / run_folder.SUMMARY), "notes": notes, **of_sigma}


@contextmanager
def _alone_with_its_fault(folder: Path, writer: Writer) -> Iterator[None]:
    """End this rank when its data fails on it alone, or when another rank has ended.

    The rank cannot notify the other ranks, which wait in a collective or are gone. It prints the fault, finishes the
    checkpoint that is being written, and exits; the launcher ends the other ranks.
    """
    try:
        yield
    except DataError as error:
        if comm.is_known_to_all(error):
            raise
        message, code = str(error), error.exit_code
    except RuntimeError as error:
        if not (lost := comm.lost_rank(error)):
            raise
        message = (
            f"another rank has ended or is cut off ({lost}): its log says why; the same command continues from the last "
            "checkpoint"
        )
        code = TrainingStopped.exit_code
    else:
        return
    say(f"vaescale train: rank {comm.rank()}: {message}")
    writer.join()
    if comm.is_main():
        run_folder.write_stopped(folder, code, message)
    end_workers()
    os._exit(exit_codes.leave(code))
