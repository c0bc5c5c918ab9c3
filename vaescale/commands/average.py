"""Put an average of the weights of any length together after training, from the averages that a run's checkpoints hold."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from vaescale.commands.export import write_run
from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.recipe import Recipe
from vaescale.runs import checkpoint
from vaescale.system import heartbeat
from vaescale.system.console import Progress, say
from vaescale.trained import Trained, open_trained
from vaescale.training.averages import Average, averages_of, gamma_of, mix, name_of
from vaescale.training.config import MOST_SIGMA_REL
from vaescale.training.strategies.base import averaged_buffers

LARGE_ERROR = 0.1  # of the profile, above which a sentence says so
SMALLEST_FACTOR = 1e-12


class Saved(NamedTuple):
    """An average in a checkpoint: name of the file, and what its numbers of steps and kind say of its profile."""

    checkpoint: checkpoint.Checkpoint
    name: str
    average: Average


@checked
def average(
    run: Path,
    out: Path,
    *,
    sigma_rel: Annotated[float, Field(gt=0, lt=MOST_SIGMA_REL)] | None = None,
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None,
) -> dict[str, Any]:
    """Write a run folder with the average of the weights that sigma_rel or decay names, put together from a run's checkpoints.

    sigma_rel: standard deviation of a power-function average as a share of training (Karras et al. 2024, section 3.2); decay: that of
    an exponential average. Give one of them. OUT must not exist; the other verbs open it, and init_from takes it. Returns its path, the
    factors by checkpoint and average, and the error of the profile. Raises UserError for a run with too few averages.
    """
    if (sigma_rel is None) == (decay is None):
        raise UserError("give either --sigma-rel or --decay")
    if out.exists():
        raise UserError(f"{out} already exists; delete it or choose another OUT")
    trained = open_trained(run, of_sequences=True)
    trained.announce("average")
    saved = _saved(trained.folder, trained.recipe, upto=trained.step)
    wished = (
        Average(decay, trained.recipe.training.ema_warmup)
        if sigma_rel is None
        else Average(gamma=gamma_of(sigma_rel))
    )
    factors, error = mix([(one.checkpoint.step, one.average) for one in saved], (trained.step, wished))
    used = [
        (one, float(factor))
        for one, factor in zip(saved, factors, strict=True)
        if abs(factor) > SMALLEST_FACTOR
    ]
    name = name_of(decay, sigma_rel)
    if error > LARGE_ERROR:
        say(
            f"{name} is only roughly what the {len(saved)} saved averages can say: the profile is off by {error:.0%}; more "
            "checkpoints (training.keep_every) or averages (training.ema_sigma_rel) help"
        )
    _load(trained, used)
    listed = [
        {
            "step": one.checkpoint.step,
            "average": one.name,
            "sha256": one.checkpoint.sha256(one.name),
            "factor": factor,
        }
        for one, factor in used
    ]
    identity = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_run(trained._replace(weights=name, weights_hash=identity), out)
    return {
        "out": str(out),
        "run": trained.recipe.name,
        "step": trained.step,
        "weights": name,
        "profile_error": error,
        "factors": listed,
    }


def _saved(folder: Path, recipe: Recipe, *, upto: int) -> list[Saved]:
    """The averages in a run's sound checkpoints, the newest last. Raises UserError when there are fewer than two."""
    kinds, saved = averages_of(recipe.training), list[Saved]()
    for one in checkpoint.sound(folder / "checkpoints"):
        if one.step <= upto:
            saved += [Saved(one, name, kinds[name]) for name in one.averages() if name in kinds]
    if len(saved) < 2:
        raise UserError(
            f"{folder} has {len(saved)} averages of the weights in its checkpoints, which say nothing of another length; train with "
            "training.ema_sigma_rel=[0.05,0.1] and training.keep_every"
        )
    return saved


@torch.no_grad()
def _load(trained: Trained, used: list[tuple[Saved, float]]) -> None:
    """Load the sum of averages, each times its factor, into a model; summed in float64. What is not averaged stays the newest's."""
    state = trained.model.state_dict()
    names = dict(trained.model.named_parameters()).keys() | averaged_buffers(trained.model)
    sums = {name: torch.zeros_like(state[name], dtype=torch.float64) for name in sorted(names)}
    with Progress("average", len(used), unit="averages") as progress:
        for number, (one, factor) in enumerate(used, start=1):
            tensors = one.checkpoint.tensors(one.name)
            heartbeat.beat("averaging")
            for name, total in sums.items():
                total.add_(tensors[name].to(total), alpha=factor)
            progress.update(number)
    for name, total in sums.items():
        state[name].copy_(total)
