"""What a run is, and whether a start may go on in its folder."""

import subprocess
from pathlib import Path
from typing import Any

import torch

import vaescale
from vaescale.errors import DataError, UserError
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.checkpoint import Checkpoint, is_exported
from vaescale.system.console import say
from vaescale.system.secrets import redact

ALLOW = "--allow-changes"
REMEDY = f"choose another name or run_dir, or go on with the change: {ALLOW}"


def tags(
    recipe: Recipe, *, data_hash: str, val_data_hash: str, plan_hash: str, **launch: Any
) -> dict[str, Any]:
    """What identifies a run: in its folder, its checkpoints and MLflow. launch: world size and strategy."""
    return {
        "git_revision": git_revision(),
        "recipe_hash": recipe.hash,
        "data_hash": data_hash,
        "val_data_hash": val_data_hash,
        "plan_hash": plan_hash,
        **launch,
        "vaescale_version": vaescale.__version__,
        "torch_version": str(torch.__version__),
    }


def refuse_foreign_folder(
    folder: Path, recipe: Recipe, own: dict[str, Any], *, allow_changes: bool
) -> list[str]:
    """Raise UserError or DataError when the folder holds another run, or something else.

    allow_changes: of the recipe and the data. Returns the changes, in words.
    """
    path = folder / run_folder.RECIPE
    if not path.is_file():
        # A start that was killed early leaves a lock and half-written files, which belong to nobody.
        if folder.is_dir() and any(p.name != "lock" and not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"run_dir {folder} holds files but no run; choose another name or run_dir")
        return []
    if is_exported(folder / "checkpoints"):
        raise UserError(
            f"run_dir {folder} is an exported run, which has weights but no optimizer state to train with; choose another "
            "run_dir"
        )
    if recipe.training.resume == "never":
        raise UserError(
            f"run_dir {folder} holds a run and training.resume is never; choose another name or run_dir"
        )
    changes = differences(load_recipe(path).identity(), recipe.identity())
    if changes and not allow_changes:
        raise UserError(f"run_dir {folder} holds a run of another recipe ({'; '.join(changes)}); {REMEDY}")
    before = run_folder.read_json(folder / run_folder.TAGS)
    for name, now in (("data_hash", recipe.data.train), ("val_data_hash", recipe.data.val)):
        if before.get(name, own[name]) != own[name]:
            words = f"{name}: {before[name][:12]} -> {own[name][:12]} ({now})"
            if not allow_changes:
                raise DataError(f"run_dir {folder} was made with other data ({words}); {REMEDY}")
            changes.append(words)
    return changes


def refuse_other(found: Checkpoint, own: dict[str, Any], *, allow_changes: bool) -> None:
    """Raise UserError when a checkpoint is of another recipe, order or data set."""
    state = found.state()
    for name in ("recipe_hash", "plan_hash", "data_hash"):
        if state.get(name) != own[name] and not allow_changes:
            raise UserError(f"checkpoint {found.folder} has another {name}; {REMEDY}")


def remember(folder: Path, own: dict[str, Any], changes: list[str], *, step: int) -> None:
    """Write the run's tags, and which changes it went on with, at which step."""
    before = run_folder.read_json(folder / run_folder.TAGS).get("changes", [])
    if changes:
        say(f"going on from step {step} with {'; '.join(changes)}")
        before = [*before, {"step": step, "changes": [redact(change) for change in changes]}]
    run_folder.write_json(folder / run_folder.TAGS, own | ({"changes": before} if before else {}))


def git_revision() -> str:
    """The commit of the working folder, `-dirty` with changes, or `none` outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"
