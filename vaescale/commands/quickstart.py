"""Run the main job end to end on scikit-learn's handwritten digits; each step is a command that a person can type."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs.folder import read_json
from vaescale.system.console import say
from vaescale.system.shipped import PREFIX, shipped_folder

RECIPE = "digits/optimal"
BACKEND = "backends/cpu2"
PROCESSES = 2


class Step(NamedTuple):
    """A step: a heading, the command, and whether its results exist."""

    heading: str
    command: str
    exists: Callable[[], bool]


def quickstart() -> dict[str, Any]:
    """Run the steps whose results do not exist. Returns the results, the paths and the seconds of each step.

    In a folder with the project's recipes it uses those, elsewhere the ones that come with the package. Raises UserError
    when a step fails.
    """
    path = Path("recipes", f"{RECIPE}.yaml")
    name = str(path) if path.is_file() else f"{PREFIX}{RECIPE}"
    recipe = load_recipe(Path(name))
    folder = Path(recipe.run_dir)
    steps = _steps(name, recipe, folder)
    seconds = {}
    for number, (verb, step) in enumerate(steps.items(), start=1):
        say(f"\n== {number}/{len(steps)}  {step.heading}\n   $ {step.command}")
        start = time.perf_counter()
        if step.exists():
            say("   skipped: the results exist")
        else:
            _call(step.command)
        seconds[verb] = round(time.perf_counter() - start, 1)
    return {
        "run": str(folder),
        "recipe": name,
        "metrics": read_json(folder / "evaluation/val.json")["metrics"],
        "gmm": read_json(folder / "gmm/mixture.json"),
        "quality": read_json(folder / "evaluation/quality-pixels.json")["rows"],
        "figures": sorted(str(path) for path in (folder / "figures").glob("*.png")),
        "mlflow": recipe.tracking.mlflow,
        "seconds": seconds,
    }


def _steps(name: str, recipe: Recipe, folder: Path) -> dict[str, Step]:
    """The steps in order, by name. name: the recipe's on the command line."""
    backend = Path("recipes", f"{BACKEND}.yaml")
    if not backend.is_file():
        backend = shipped_folder() / f"{BACKEND}.yaml"
    figures = folder / "figures"
    last = f"checkpoints/step-{recipe.training.steps:09d}"
    data = Path(recipe.data.val).parent
    return {
        "shards": Step(
            "Write the digits as WebDataset shards",
            f"vaescale make-shards digits {data} --shard-samples 500",
            lambda: all((data / split / "index.json").is_file() for split in ("train", "val")),
        ),
        "train": Step(
            f"Train on {PROCESSES} processes, in bf16, with the optimal sigma",
            f"accelerate launch --config_file {shlex.quote(str(backend))} -m vaescale train {name} --expect-processes {PROCESSES}",
            lambda: (
                (figures / "curves.png").is_file()
                and (folder / last / "manifest.json").is_file()
                and _is_of(recipe, folder / last / "state.json")
            ),
        ),
        "evaluate": Step(
            "Evaluate on held-out digits",
            f"vaescale evaluate {folder}",
            lambda: (
                _is_of(recipe, folder / "evaluation/val.json") and (figures / "reconstructions.png").is_file()
            ),
        ),
        "fit-gmm": Step(
            "Fit a mixture to the aggregate posterior",
            f"vaescale fit-gmm {folder} --components 1,10,50,100",
            lambda: (
                _is_of(recipe, folder / "gmm/mixture.json")
                and len(list(folder.glob("gmm/components-*"))) == 4
            ),
        ),
        "sample": Step(
            "Sample from the prior and from the mixture",
            f"vaescale sample {folder}",
            lambda: _newer(figures / "samples.png", folder / "gmm/mixture.json"),
        ),
        "quality": Step(
            "Judge samples of prior and mixtures against the training images",
            f"vaescale quality {folder} --features pixels",
            lambda: _newer(folder / "evaluation/quality-pixels.json", folder / "gmm/mixture.json"),
        ),
    }


def _is_of(recipe: Recipe, path: Path) -> bool:
    """Return whether a result was computed at the recipe's last step."""
    result = read_json(path)
    return (result.get("recipe_hash"), result.get("step")) == (recipe.hash, recipe.training.steps)


def _call(command: str) -> None:
    """Run a command with this interpreter, its output on stderr. Raises UserError with its exit code when it fails."""
    program, *rest = shlex.split(command)
    module = {"vaescale": ["vaescale"], "accelerate": ["accelerate.commands.launch"]}[program]
    rest = rest[1:] if program == "accelerate" else rest
    done = subprocess.run(
        [sys.executable, "-m", *module, *rest],
        stdout=sys.stderr,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    if done.returncode:
        error = UserError(f"`{command}` failed with exit code {done.returncode}; see its output above")
        error.exit_code = done.returncode if done.returncode in (2, 3, 4) else 4
        raise error


def _newer(path: Path, than: Path) -> bool:
    return path.is_file() and than.is_file() and path.stat().st_mtime >= than.stat().st_mtime
