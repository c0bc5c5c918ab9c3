"""A run that was trained on the latents of another run: where its latents come from, and how it becomes a prior of that run."""

from pathlib import Path
from typing import Any

from vaescale.aggregate.second_stage import SecondStage
from vaescale.data.latent_shards import Standardized
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.runs import folder as run_folder
from vaescale.trained import Trained, open_trained, refuse_condition

OF_RUN = ("run", "step", "weights", "weights_hash", "standardized")


def origin_of(train: ShardReader, val: ShardReader) -> dict[str, Any]:
    """The run, the weights and the scale of the latents or codes in two sets. Raises DataError when they differ."""
    origins = [{name: one.index.made.get(name) for name in OF_RUN} for one in (train, val)]
    for name in OF_RUN:
        if origins[0][name] != origins[1][name]:
            raise DataError(
                f"{train.index.place} and {val.index.place} hold latents or codes that differ in their {name}; encode both splits alike"
            )
    return origins[0]


def open_second_stage(folder: Path, first: Trained) -> SecondStage:
    """Open the run in `folder` as a prior of the run `first`. All ranks call it.

    Raises UserError when it is no run, or was not trained on latents of these very weights.
    """
    if not (folder / run_folder.RECIPE).is_file():
        raise UserError(
            f"prior must be 'standard', 'gmm' or the folder of a run that was trained on latents (got {str(folder)!r})"
        )
    refuse_condition(
        first, "a model of latents", "take --prior standard, or mixtures of the classes (fit-gmm --per-class)"
    )
    second = open_trained(folder, of_latents=True)
    if second.recipe.data.holds == "codes":
        raise UserError(
            f"{folder} is a model of codes, which `vaescale fit-prior RUN` makes a prior of its run: give --prior autoregressive"
        )
    origin = second.latents_of
    if not origin:
        raise UserError(
            f"{folder} was not trained on latents; train it with data.holds=latents on {first.folder}/latents"
        )
    if origin["weights_hash"] != first.weights_hash:
        raise UserError(
            f"{folder} was trained on latents of {origin['run']} at step {origin['step']} ({origin['weights']} weights), which are "
            f"not the {first.weights} weights of {first.folder} at step {first.step}; train it again after `vaescale encode "
            f"{first.folder}`"
        )
    scale = origin["standardized"]
    return SecondStage(
        second.model.to(first.device),
        Standardized(tuple(scale["mean"]), tuple(scale["std"])) if scale else None,
        {"run": str(folder), **second.identity},
    )
