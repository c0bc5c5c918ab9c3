"""Train variants of a recipe, one for each combination of values, one after another or as the tasks of a cluster job."""

import itertools
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vaescale.commands.compare_runs import record_of_folder
from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.cluster_jobs import cluster_files, slug
from vaescale.runs.comparison import compare, in_brief
from vaescale.runs.mlflow import parent_run
from vaescale.runs.sweeps import STATE
from vaescale.system import plugins
from vaescale.system.console import say
from vaescale.system.exit_codes import PREEMPTED
from vaescale.system.secrets import redact

MOST_VARIANTS = 1000
INTERRUPTED = 130  # Ctrl-C; SIGTERM and SIGUSR1 end with PREEMPTED
STOPPED = (PREEMPTED, INTERRUPTED)  # the remaining variants are not started


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

    After training, `best_first` has the last metrics of the runs, and `sorted_by` the metric that decides.

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
        modules = plugins.named()
        start = shlex.join([*shlex.split(start), *(f"--import={module}" for module in modules)])
        files = cluster_files(write, recipe, overridden, folders, name=sweep_name, launch=start, image=image)
        for file_name, content in files.items():
            (folder / file_name).write_text(content)
        if modules and write == "kubernetes":
            say(f"the image {image} must have {', '.join(modules)}, which each task imports")
        return {**result, "files": [str(folder / file_name) for file_name in files]}
    codes = train_all(recipe, planned, recipes, launch=shlex.split(launch))
    for row, code in zip(result["variants"], codes, strict=True):
        row["exit_code"] = code
    return {**result, "folder": str(folder), **_numbers(recipes)}


def _numbers(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """The last metrics of the runs, the best first; {} where none has any."""
    records = []
    for resolved in recipes:
        with suppress(UserError):  # a run that failed at once has said why
            records.append(record_of_folder(Path(resolved.run_dir)))
    if not records:
        return {}
    compared = compare(records)
    return {
        "sorted_by": compared.sort,
        "best_first": in_brief(compared),
        "warnings": compared.warnings,
    }


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

    A variant that is preempted or interrupted is the last one trained; the remaining ones get its exit code. So does a
    variant that a signal ended, unless it was trained by then: that one counts as trained.
    """
    starter = _starter(launch)
    codes: list[int] = []
    with _Signals() as signals:
        for number, (variant, resolved) in enumerate(zip(variants, recipes, strict=True), start=1):
            say(f"\n== {number}/{len(variants)}  {variant.name}")
            started = time.time()
            ended = signals.ended([*starter, str(recipe), *variant.overrides])
            codes.append(_code_of(ended, resolved, started, signals.code))
            stopped = codes[-1] if codes[-1] in STOPPED else signals.code
            if stopped is not None:
                left = len(variants) - number
                if codes[-1] in STOPPED or left:
                    where = f"in {variant.name}" if codes[-1] in STOPPED else f"after {variant.name}"
                    say(f"stopped {where}; run the same command again to continue")
                return codes + [stopped] * left
    return codes


def _code_of(ended: int, resolved: Recipe, started: float, stopped_by: int | None) -> int:
    """The exit code of a variant whose process ended with `ended`.

    started: when it did, in seconds since 1970. stopped_by: the sweep's own exit code, if a signal stopped it.
    """
    folder = Path(resolved.run_dir)
    if ended in (0, 2, 3, 4, *STOPPED):
        return ended
    stopped = run_folder.read_json(folder / run_folder.STOPPED)
    if "exit_code" in stopped and stopped.get("time", 0) >= started:  # else from an earlier start
        return int(stopped["exit_code"])  # a launcher's own exit code is always 1
    if stopped_by is None:
        return 4
    return 0 if run_folder.is_trained(folder, resolved.training.steps) else stopped_by


class _Signals:
    """The signals that a sweep gets while it trains. code: the exit code that they ask for, or None.

    SIGTERM and SIGUSR1 are forwarded to the process that trains (a terminal sends Ctrl-C to both), and the sweep waits
    while that process saves.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._is_forwarded = False
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ended(self, command: Sequence[str]) -> int:
        """Run a command and return its exit code."""
        with subprocess.Popen(command, stdout=sys.stderr) as child:
            self._child = child
            if self.code == PREEMPTED and not self._is_forwarded:  # the signal came before the process
                child.send_signal(signal.SIGTERM)
            try:
                return child.wait()
            finally:
                self._child = None

    def _take(self, number: int, _: object) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if number != signal.SIGINT and self._child is not None:
            self._is_forwarded = True
            self._child.send_signal(signal.SIGTERM)  # accelerate's launcher forwards SIGTERM only


def _starter(launch: Sequence[str]) -> list[str]:
    """The command that trains a recipe: in this Python, by `vaescale launch`, or under accelerate's or another launcher."""
    if not launch:
        return [sys.executable, "-m", "vaescale", "train"]
    if list(launch[:2]) == ["vaescale", "launch"]:
        return [sys.executable, "-m", *launch]
    if list(launch[:2]) == ["accelerate", "launch"]:
        launch = [sys.executable, "-m", "accelerate.commands.launch", *launch[2:]]
    return [*launch, "-m", "vaescale", "train"]
