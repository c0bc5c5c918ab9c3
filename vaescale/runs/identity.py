"""The identity of a run, and the check whether a start may continue in its folder."""

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import vaescale
from vaescale.errors import DataError, UserError
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint, Shapes, is_exported, newest, refuse_unfit
from vaescale.system.console import say
from vaescale.system.secrets import redact

ALLOW = "--allow-changes"
REMEDY = f"choose another name or run_dir, or continue with the change: {ALLOW}"


def identity_tags(
    *, recipe_hash: str, data_hash: str, val_data_hash: str, plan_hash: str, **launch: Any
) -> dict[str, Any]:
    """The tags that identify a run in its folder, its checkpoints and MLflow. launch: world size and layout."""
    return {
        "git_revision": git_revision(),
        "recipe_hash": recipe_hash,
        "data_hash": data_hash,
        "val_data_hash": val_data_hash,
        "plan_hash": plan_hash,
        **launch,
        "vaescale_version": vaescale.__version__,
        "torch_version": str(torch.__version__),
    }


def refuse_foreign_folder(
    folder: Path,
    tags: Mapping[str, Any],
    *,
    data: Mapping[str, str],
    recipe_changes: Callable[[], list[str]],
    shapes: Mapping[str, Shapes],
    may_resume: bool,
    allow_changes: bool,
) -> list[str]:
    """Raise UserError or DataError when the folder holds another run, or something else.

    data: the folder or URL of the data set behind the tags `data_hash` and `val_data_hash`. recipe_changes: returns the
    differences from the folder's recipe, called only if it has one. shapes: those of the recipe's model, by file of a
    checkpoint: a run whose checkpoint has others cannot go on with the changes. may_resume: whether the recipe allows a run to continue.
    allow_changes: accept changes of recipe and data. Returns the accepted changes as phrases.
    """
    if not (folder / run_folder.RECIPE).is_file():
        # A start that was killed early leaves a lock and half-written files, which are not a run.
        if folder.is_dir() and any(p.name != "lock" and not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"run_dir {folder} holds files but no run; choose another name or run_dir")
        return []
    if is_exported(folder / "checkpoints"):
        raise UserError(
            f"run_dir {folder} is an exported run, which has weights but no optimizer state to train with; choose another "
            "run_dir"
        )
    if not may_resume:
        raise UserError(
            f"run_dir {folder} holds a run and training.resume is never; choose another name or run_dir"
        )
    changes = recipe_changes()
    if changes and _has_other_shapes(folder, shapes):
        raise UserError(
            f"run_dir {folder} holds a run of another recipe, whose weights do not fit ({'; '.join(changes)}); choose another name "
            "or run_dir"
        )
    if changes and not allow_changes:
        raise UserError(f"run_dir {folder} holds a run of another recipe ({'; '.join(changes)}); {REMEDY}")
    before = run_folder.read_json(folder / run_folder.TAGS)
    for name, location in data.items():
        if before.get(name, tags[name]) != tags[name]:
            change = f"{name}: {before[name][:12]} -> {tags[name][:12]} ({location})"
            if not allow_changes:
                raise DataError(f"run_dir {folder} was made with other data ({change}); {REMEDY}")
            changes.append(change)
    return changes


def _has_other_shapes(folder: Path, shapes: Mapping[str, Shapes]) -> bool:
    """Whether the newest checkpoint of a folder has tensors of other names, types or shapes."""
    saved = newest(folder / "checkpoints")
    if saved is None:
        return False
    try:
        refuse_unfit(saved, shapes)
    except UserError:
        return True
    return False


def refuse_other(saved: Checkpoint, tags: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Raise UserError when a checkpoint belongs to another recipe, sample order or data set."""
    state = saved.state()
    for name in ("recipe_hash", "plan_hash", "data_hash"):
        if state.get(name) != tags[name] and not allow_changes:
            raise UserError(f"checkpoint {saved.folder} has another {name}; {REMEDY}")


def remember(folder: Path, tags: Mapping[str, Any], changes: list[str], *, step: int) -> None:
    """Write the run's tags, when its first start began, and the accepted changes with the step from which they apply."""
    known = run_folder.read_json(folder / run_folder.TAGS)
    before, started = known.get("changes", []), known.get(run_folder.STARTED) or run_folder.first_time(folder)
    if changes:
        say(f"continuing from step {step} with {'; '.join(changes)}")
        before = [*before, {"step": step, "changes": [redact(change) for change in changes]}]
    began = {run_folder.STARTED: round(started or time.time(), 3)}
    run_folder.write_json(
        folder / run_folder.TAGS, {**tags, **began, **({"changes": before} if before else {})}
    )


def git_revision() -> str:
    """The commit of the working folder, `-dirty` with changes, or `none` outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"
