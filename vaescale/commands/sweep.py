"""Train variants of a recipe, one for each combination of values, one after another or as the tasks of a cluster job."""

import itertools
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.cluster_jobs import cluster_files, slug
from vaescale.runs.mlflow import parent_run
from vaescale.system.console import say
from vaescale.system.secrets import redact

MOST_VARIANTS = 1000
STOPPED = (75, 130)  # preempted, Ctrl-C: the remaining variants are not started
STATE = "sweep.json"


class Variant(NamedTuple):
    """The name of a variant and its overrides, the last of which is `name=NAME`."""

    name: str
    overrides: list[str]


@checked
def sweep(
    recipe: Path,
    overrides: Sequence[str],
    *,
    name: str | None = None,
    launch: str = "",
    write: Literal["slurm", "kubernetes"] | None = None,
    image: str = "vaescale:latest",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train every variant of a recipe, or write the files of a cluster job. Returns the variants, with exit codes or files.

    overrides: `key=a,b,c`. name: the name of the sweep and prefix of its runs' names, by default the recipe's name, with
    `-sweep` for the sweep itself. launch: the command that starts each run, by default one process of this Python, or
    `vaescale launch` where files are written. write:
    write job files to runs/NAME instead of training. dry_run: only return the variants. Raises UserError for a fault of any
    variant, before training the first one.
    """
    base = load_recipe(recipe)
    sweep_name = name or f"{base.name}-sweep"
    if sweep_name != slug(sweep_name) or sweep_name.startswith("."):
        raise UserError(
            f"--name {sweep_name!r} must be a file name of letters, digits and dashes that does not begin with a dot"
        )
    planned = variants(overrides, name or base.name)
    recipes = [
        load_recipe(recipe, variant.overrides) for variant in planned
    ]  # an invalid variant raises before the first training
    result: dict[str, Any] = {
        "sweep": sweep_name,
        "variants": [
            {"name": resolved.name, "run_dir": resolved.run_dir, "overrides": variant.overrides}
            for variant, resolved in zip(planned, recipes, strict=True)
        ],
    }
    folder = Path("runs") / sweep_name
    if dry_run:
        return result
    planned = begin(recipe, planned, recipes, folder)
    if write:
        folders = [resolved.run_dir for resolved in recipes]
        overridden = [variant.overrides for variant in planned]
        start = launch or "vaescale launch"
        files = cluster_files(write, recipe, overridden, folders, name=sweep_name, launch=start, image=image)
        for file_name, content in files.items():
            (folder / file_name).write_text(content)
        return {**result, "files": [str(folder / file_name) for file_name in files]}
    codes = train_all(recipe, planned, recipes, launch=shlex.split(launch))
    for row, code in zip(result["variants"], codes, strict=True):
        row["exit_code"] = code
    return {**result, "folder": str(folder)}


def variants(overrides: Sequence[str], name: str) -> list[Variant]:
    """Return every combination of the values of overrides such as `key=a,b` and `key=c`, named after the values that vary.

    Raises UserError for an override of another form, for nothing to vary, and for two variants of one name.
    """
    choices: list[tuple[str, list[str]]] = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"{override!r} is not key=a,b,c, such as optimizer.lr=1e-3,2e-3")
        if key in ("name", "run_dir"):
            raise UserError(f"{key} is set for each variant by the sweep; give the sweep a --name instead")
        choices.append((key, split_values(values)))
    if all(len(values) == 1 for _, values in choices):
        raise UserError("there is nothing to vary; give a key several values, such as optimizer.lr=1e-3,2e-3")
    named: dict[str, Variant] = {}
    for taken in itertools.product(*(values for _, values in choices)):
        varied = [
            f"{key.rpartition('.')[2]}-{slug(redact(value))}"
            for (key, values), value in zip(choices, taken, strict=True)
            if len(values) > 1
        ]
        variant = "-".join([name, *varied])
        if variant in named:
            raise UserError(f"two variants would both be named {variant}; leave one of the values out")
        settings = [f"{key}={value}" for (key, _), value in zip(choices, taken, strict=True)]
        named[variant] = Variant(variant, [*settings, f"name={variant}"])
        if len(named) > MOST_VARIANTS:
            raise UserError(f"there are more than {MOST_VARIANTS} variants; give fewer values")
    return list(named.values())


def split_values(text: str) -> list[str]:
    """Split `a,[1,2],{b: 1}` at the commas outside of brackets, braces and quotes. Raises UserError for unclosed ones."""
    values, depth, quote, start = [], 0, "", 0
    for position, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            values.append(text[start:position])
            start = position + 1
    values.append(text[start:])
    if depth or quote or not all(value.strip() for value in values):
        raise UserError(f"{text!r} is not a list of values; separate them by commas, and close each bracket")
    return [value.strip() for value in values]


def begin(
    recipe: Path, variants: Sequence[Variant], recipes: Sequence[Recipe], folder: Path
) -> list[Variant]:
    """Write the list of the sweep's runs to its folder. Returns the variants with the MLflow parent run as an
    override, which is the same at every call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parent = run_folder.read_json(folder / STATE).get("mlflow_run") or parent_run(
        recipes[0].tracking.mlflow, recipes[0].tracking.experiment, folder.name
    )
    folders = [resolved.run_dir for resolved in recipes]
    run_folder.write_json(folder / STATE, {"recipe": str(recipe), "mlflow_run": parent, "runs": folders})
    below = [f"tracking.parent={parent}"] if parent else []
    return [variant._replace(overrides=[*variant.overrides, *below]) for variant in variants]


def train_all(
    recipe: Path,
    variants: Sequence[Variant],
    recipes: Sequence[Recipe],
    *,
    launch: Sequence[str],
) -> list[int]:
    """Train each variant in a process of its own. Returns their exit codes.

    A variant that is preempted or interrupted is the last one trained; the remaining ones get its exit code.
    """
    starter = _starter(launch)
    codes: list[int] = []
    for number, (variant, resolved) in enumerate(zip(variants, recipes, strict=True), start=1):
        say(f"\n== {number}/{len(variants)}  {variant.name}")
        started = time.time()
        ended = _ended([*starter, str(recipe), *variant.overrides])
        stopped = run_folder.read_json(Path(resolved.run_dir) / run_folder.STOPPED)
        if stopped.get("time", 0) < started:  # from an earlier start
            stopped = {}
        # A launcher's own exit code is always 1.
        code = ended if ended in (0, 2, 3, 4, *STOPPED) else stopped.get("exit_code", 4)
        codes.append(int(code))
        if code in STOPPED:
            say(f"stopped in {variant.name}; run the same command again to continue")
            return codes + [int(code)] * (len(variants) - len(codes))
    return codes


def _ended(command: Sequence[str]) -> int:
    """Run a command and return its exit code. Forwards SIGTERM and SIGUSR1 to the command (a terminal sends Ctrl-C to
    both processes) and waits while it saves.
    """
    with subprocess.Popen(command, stdout=sys.stderr) as child:
        handlers: dict[int, Any] = {signal.SIGINT: lambda *_: None}
        for number in (signal.SIGTERM, signal.SIGUSR1):  # accelerate's launcher forwards SIGTERM only
            handlers[number] = lambda *_: child.send_signal(signal.SIGTERM)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return child.wait()
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)


def runs_of(folder: Path) -> list[Path]:
    """The run folders that a sweep's folder lists, or the folder itself when it is not the folder of a sweep."""
    runs = run_folder.read_json(folder / STATE).get("runs")
    return [folder] if runs is None else [Path(run) for run in runs]


def _starter(launch: Sequence[str]) -> list[str]:
    """The command that trains a recipe: in this Python, by `vaescale launch`, or under accelerate's or another launcher."""
    if not launch:
        return [sys.executable, "-m", "vaescale", "train"]
    if list(launch[:2]) == ["vaescale", "launch"]:
        return [sys.executable, "-m", *launch]
    if list(launch[:2]) == ["accelerate", "launch"]:
        launch = [sys.executable, "-m", "accelerate.commands.launch", *launch[2:]]
    return [*launch, "-m", "vaescale", "train"]
