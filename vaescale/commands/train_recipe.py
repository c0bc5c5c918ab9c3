"""Train a recipe in this process and open the run: `run = vaescale.train("vaescale:digits/optimal", run_dir="runs/first")`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaescale.commands.run import Run, load
from vaescale.commands.train import train
from vaescale.errors import UserError
from vaescale.recipe import Recipe, recipe_of


def train_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    allow_changes: bool = False,
    device: str | None = None,
    **overrides: Any,
) -> Run:
    """Train to the last step, or continue from the newest checkpoint, on one process. Returns the opened run.

    recipe: a file, `vaescale:NAME`, a nested mapping or a Recipe. overrides: keys of the recipe, a whole section as training={"steps":
    100} or single keys as **{"training.steps": 100}. allow_changes: continue a run whose recipe or data have changed. device: where the
    run is opened afterwards; training takes a GPU if there is one. Raises UserError, also where a launcher has started several processes:
    `vaescale launch` trains on these.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"vaescale.train trains on one process, and WORLD_SIZE is {os.environ['WORLD_SIZE']}; use `vaescale launch RECIPE` for several"
        )
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    resolved = recipe_of(recipe, overrides)
    if resolved.data.holds == "sequences":
        raise UserError(
            "vaescale.train opens the run that it trains, and runs of sequences (data.holds) are read by verbs alone; use `vaescale train "
            "RECIPE`"
        )
    result = train(resolved, allow_changes=allow_changes)
    return load(Path(result["run_dir"]), device=device)
