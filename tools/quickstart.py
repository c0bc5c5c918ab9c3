"""The main job end to end on scikit-learn's handwritten digits: shards, training on two processes, evaluation,
mixture, samples and how good they are. Each step is a command that you can type yourself. What is there already is used again.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.system.console import say

RECIPE = Path("recipes/digits/optimal.yaml")
BACKEND = Path("recipes/backends/cpu2.yaml")
PROCESSES = 2


class Step(NamedTuple):
    """A heading, the command as typed, and whether its results are there already."""

    heading: str
    command: str
    there: Callable[[], bool]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG001
    """Run what is not there yet. Returns the results, the paths and the seconds of each step."""
    from vaescale.recipe import load_recipe
    from vaescale.runs.folder import read_json

    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is not here; run the quickstart in the project's folder")
    recipe = load_recipe(RECIPE)
    folder = Path(recipe.run_dir)

    def same(name: str, **expected: object) -> bool:
        """Whether a result belongs to this recipe's last step, and was made as the step below makes it."""
        result = read_json(folder / name)
        expected |= {"recipe_hash": recipe.hash, "step": recipe.training.steps}
        return all(result.get(key) == value for key, value in expected.items())

    figures = folder / "figures"
    last = f"checkpoints/step-{recipe.training.steps:09d}"
    trained = (figures / "curves.png").is_file() and (folder / last / "manifest.json").is_file()
    trained &= same(f"{last}/state.json")
    data = Path(recipe.data.train).parent
    launch = f"accelerate launch --config_file {BACKEND} -m vaescale train {RECIPE} --processes {PROCESSES}"
    steps = {
        "shards": Step(
            "Write the digits as WebDataset shards",
            f"vaescale make-shards digits {data} --shard-samples 500",
            lambda: all((data / split / "index.json").is_file() for split in ("train", "val")),
        ),
        "train": Step(
            f"Train on {PROCESSES} processes, in bf16, with the optimal sigma", launch, lambda: trained
        ),
        "evaluate": Step(
            "Evaluate on held-out digits",
            f"vaescale evaluate {folder}",
            lambda: same("evaluation/val.json") and (figures / "reconstructions.png").is_file(),
        ),
        "fit-gmm": Step(
            "Fit a mixture to the aggregate posterior",
            f"vaescale fit-gmm {folder} --components 1,10,50,100",
            lambda: same("gmm/mixture.json") and len(list(folder.glob("gmm/components-*"))) == 4,
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
    seconds = {}
    for number, (name, step) in enumerate(steps.items(), start=1):
        say(f"\n== {number}/{len(steps)}  {step.heading}\n   $ {step.command}")
        start = time.perf_counter()
        if step.there():
            say("   there already")
        else:
            _call(step.command)
        seconds[name] = round(time.perf_counter() - start, 1)
    return {
        "run": str(folder),
        "metrics": read_json(folder / "evaluation/val.json")["metrics"],
        "gmm": read_json(folder / "gmm/mixture.json"),
        "quality": read_json(folder / "evaluation/quality-pixels.json")["rows"],
        "figures": sorted(str(path) for path in figures.glob("*.png")),
        "mlflow": recipe.tracking.mlflow,
        "seconds": seconds,
    }


def show(result: dict[str, Any]) -> None:
    """One table, and what to try next."""
    from vaescale.system.console import table

    metrics, gmm, folder = result["metrics"], result["gmm"], result["run"]
    rows = [
        ("negative ELBO", f"{metrics['neg_elbo_nats']:.2f} nats per image (a density: it can be negative)"),
        ("bits per dimension", f"{metrics['bits_per_dim']:.3f}  (nats / (64 ln 2) + 8, for 8-bit images)"),
        ("mean squared error", f"{metrics['mse']:.5f}"),
        ("sigma (running)", f"{metrics['sigma']:.4f}"),
        ("KL", f"{metrics['kl_nats']:.2f} nats"),
        ("active units", f"{metrics['active_units']:.0f}"),
        ("q(z) under the mixture", f"{gmm['val_nats']:.2f} nats, held out"),
        ("q(z) under N(0, I)", f"{gmm['prior_val_nats']:.2f} nats, held out"),
        *(("figure", path) for path in result["figures"]),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())),
    ]
    table(f"\n== Results on {metrics['images']:.0f} held-out digits ({folder})", rows)
    means = [row for row in result["quality"] if row["decode"] != "ancestral"]
    table(
        "\n== Frechet distance to the training images, of pixels (less is better)",
        [(f"{row['of']}{', means' if row['decode'] else ''}", f"{row['frechet']:.4f}") for row in means],
    )
    table(
        "\n== Next",
        [
            (
                "see all runs",
                f".venv/bin/mlflow ui --backend-store-uri {result['mlflow']}  # http://127.0.0.1:5000",
            ),
            (
                "change a line",
                f".venv/bin/vaescale train {RECIPE} name=digits-wide-sigma likelihood.sigma=0.3",
            ),
            ("more samples", f".venv/bin/vaescale sample {folder} --count 256"),
            ("what is here", ".venv/bin/vaescale --help"),
        ],
    )


def _call(command: str) -> None:
    """Run one of the commands above with this interpreter, its words on stderr."""
    words = command.split()
    module = {"vaescale": ["vaescale"], "accelerate": ["accelerate.commands.launch"]}[words[0]]
    rest = words[2:] if words[0] == "accelerate" else words[1:]
    done = subprocess.run(
        [sys.executable, "-m", *module, *rest],
        stdout=sys.stderr,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    if done.returncode:
        error = UserError(f"`{command}` failed with exit code {done.returncode}; its words stand above")
        error.exit_code = done.returncode if done.returncode in (2, 3, 4) else 4
        raise error


def _newer(path: Path, than: Path) -> bool:
    return path.is_file() and than.is_file() and path.stat().st_mtime >= than.stat().st_mtime


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
