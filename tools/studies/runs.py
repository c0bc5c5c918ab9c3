"""Runs of a study: trained by `vaescale train` unless they are finished, then judged by other verbs unless they have been."""

import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vaescale.errors import UserError
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs.folder import RECIPE, SUMMARY, read_json


class Trained(NamedTuple):
    """A run of a study: its label, recipe and held-out metrics."""

    label: str
    recipe: Recipe
    metrics: dict[str, float]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run_dir)

    @property
    def dimensions(self) -> int:
        """The number of values of an image."""
        return math.prod(self.recipe.data.image_shape)

    @property
    def beta(self) -> float:
        """The constant beta; the recipes of the studies do not anneal it."""
        return float(self.recipe.objective.model_dump()["beta"])


def train(label: str, path: Path, overrides: list[str]) -> Trained:
    """Run `vaescale train`, unless the run is finished. Returns the run with its held-out metrics."""
    recipe = load_recipe(path, overrides)
    if not finished(recipe):
        call("train", str(path), *overrides)
    return Trained(label, recipe, read_json(Path(recipe.run_dir) / SUMMARY)["val"])


def finished(recipe: Recipe) -> bool:
    """Return whether the run folder has this recipe, trained to the last step."""
    folder = Path(recipe.run_dir)
    last = read_json(folder / SUMMARY).get("val", {}).get("step")
    return last == recipe.training.steps and load_recipe(folder / RECIPE).identity() == recipe.identity()


def call(*words: str) -> None:
    """Run `vaescale WORDS`. Raises UserError where it fails."""
    command = [sys.executable, "-m", "vaescale", *words]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"vaescale {' '.join(words)} ended with exit code {done.returncode}; see above")
