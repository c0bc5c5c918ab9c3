"""Trained runs: the recipe, model, readers and seeds of a run folder; and the model of a recipe."""

import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import Field

from vaescale import comm
from vaescale.conditions.config import ClassCondition
from vaescale.data.batch import Batch
from vaescale.data.classes import refuse_other_classes
from vaescale.data.clipping import refuse_clipping
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.training_sets import open_mixture
from vaescale.data.vectors import refuse_other_vectors
from vaescale.data.workers import Workers
from vaescale.errors import UserError
from vaescale.models.build import build_vae
from vaescale.models.vae import VAE
from vaescale.objectives.base import Objective
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs import checkpoint, origins
from vaescale.runs import folder as run_folder
from vaescale.system import heartbeat
from vaescale.system.arguments import CHECKPOINT, WEIGHTS
from vaescale.system.console import say
from vaescale.training import launch as backends
from vaescale.training.skips import tell

HELD_OUT_SEED = 1 << 31
RIVAL_SEED = 1 << 32
EVALUATION_BATCH = 500  # images of a process
EVALUATION_VALUES = 500 * 3072  # of them: larger images are evaluated in smaller batches
Split = Literal["train", "val"]
Weights = Annotated[str, Field(pattern=WEIGHTS)]
"""`ema`, the main average or, without one, the raw weights; `raw`; or another average by name, such as ema-0.9999."""


Which = Annotated[str, Field(pattern=CHECKPOINT)]
"""The checkpoint to open: `last`; `best`, the one of those kept with the smallest training.keep_best (by default val/neg_elbo_nats); or
a step."""


class Trained(NamedTuple):
    """A trained model, its run folder and recipe, and which weights it has: `ema` or `raw`, their sha256.

    latents_of: of a model of latents or codes, the run and the weights of these, and the scale of latents.
    """

    folder: Path
    recipe: Recipe
    model: VAE
    step: int
    weights: str
    weights_hash: str = ""
    latents_of: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The step, the weights and the recipe that results and mixtures of this model record."""
        return {
            "step": self.step,
            "weights": self.weights,
            "weights_hash": self.weights_hash,
            "recipe_hash": self.recipe.hash,
        }

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def announce(self, verb: str, **images: ShardReader) -> None:
        """Say on the main process what a verb does with what: run, step, weights, device, and the data sets by name."""
        heartbeat.beat(verb)
        if not comm.is_main():
            return
        size = sum(parameter.numel() for parameter in self.model.parameters())
        processes = comm.world_size()
        sets = [f"{len(one)} {name} {noun_of(one)} {shape_text(one)}" for name, one in images.items()]
        where = device_name(self.device) + (f", {processes} processes" if processes > 1 else "")
        what = [f"{self.recipe.name} at step {self.step}, {self.weights} weights, {size:,} parameters", *sets]
        say(f"{verb} {self.folder}: {'; '.join([*what, where])}")

    def title(self, subject: str) -> str:
        """Title of a picture: the run's name, step and weights, and what the picture shows."""
        return f"{self.recipe.name}, step {self.step}, {self.weights} weights: {subject}"


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU with the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} with {threads} thread{'s' * (threads > 1)}"


def noun_of(reader: ShardReader) -> str:
    """What a data set holds, in words: images, or sequences of so many frames, as a sample has."""
    return f"sequences of {reader.form.shape[0]} frames" if reader.has_windows else "images"


def shape_text(reader: ShardReader) -> str:
    """The size of a data set's images as height x width x channels, such as 8x8x1."""
    channels, height, width = reader.image_shape
    return f"{height}x{width}x{channels}"


def build_model(recipe: Recipe) -> VAE:
    """The recipe's model with weights from the recipe's seed: the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_vae(
            recipe.network,
            recipe.posterior,
            recipe.likelihood,
            image_size=recipe.data.sides,
            channels=recipe.data.channels,
            spectral=recipe.objective.reads_spectrum,
            equivariance=recipe.objective.transforms,
            shows=recipe.objective.shows,
            has_bound=recipe.objective.has_bound,
            of_latents=recipe.data.holds in ("latents", "codes"),
            condition=recipe.condition,
        )


def build_objective(recipe: Recipe, model: VAE) -> Objective:
    """The recipe's objective, with the first weights of its discriminators, if it has any, from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + RIVAL_SEED)
        objective: Objective = recipe.objective.implement(model)
        return objective


def open_trained(
    folder: Path,
    *,
    weights: Weights = "ema",
    which: Which = "last",
    of_latents: bool = False,
    of_sequences: bool = False,
    device: str | None = None,
) -> Trained:
    """Open a sound checkpoint of a run, the newest by default, in evaluation mode, on `device`, by default a GPU if there is one.

    which: `last`, `best` or a step (see `Which`). All ranks call it, and open the same checkpoint. weights: `ema` takes the averaged weights when the run has them; a name
    such as ema-0.9999 another average that it has. of_latents: whether it may be a model of latents or codes; of_sequences: of sequences. Raises UserError for other
    weights, for such a model where images are needed, and when there is nothing to open.
    """
    if re.fullmatch(WEIGHTS, weights) is None:
        raise UserError(
            f"weights (={weights!r}) must be 'ema', 'raw' or an average's name such as 'ema-0.9999'"
        )
    run_folder.refuse_other(folder)
    place = _device(device)
    recipe = load_recipe(folder / run_folder.RECIPE)
    if recipe.data.holds == "codes" and not of_latents:
        raise UserError(
            f"{folder} is a model of the codes in {recipe.data.train_words}, which makes no images; give the run of these codes, with "
            "`vaescale sample RUN --prior autoregressive` for its samples"
        )
    if recipe.data.holds == "latents" and not of_latents:
        raise UserError(
            f"{folder} is a model of the latents in {recipe.data.train_words}, which makes no images; decode its samples by the run of "
            f"these latents: `vaescale sample RUN --prior {folder}`"
        )
    if recipe.data.holds == "sequences" and not of_sequences:
        raise UserError(
            f"{folder} is a model of sequences, and this reads models of images; `vaescale evaluate`, `sample`, `average` and "
            "`compare-runs` read it"
        )
    if re.fullmatch(CHECKPOINT, which) is None:
        raise UserError(f"checkpoint (={which!r}) must be 'last', 'best' or a step")
    newest = comm.on_main(lambda: _chosen(folder, recipe, which))
    if newest is None:
        raise UserError(
            f"{folder} has no sound checkpoint; train it first: `vaescale train RECIPE run_dir={folder}`"
        )
    comm.on_main(lambda: origins.tell_changes(folder, recipe.sections()))
    model = build_model(recipe)
    kind = checkpoint.file_of(newest, weights)
    checkpoint.load_weights(model, newest, kind)
    backends.set_precision("fp32")  # torch's own default has TF32 in convolutions
    # An exported run has only one kind of weights, which its state names.
    state = newest.state()
    weights = kind if kind != "model" else str(state.get(checkpoint.EXPORTED, "raw"))
    weights_hash = str(state.get("exported_weights_hash", newest.sha256(kind)))
    return Trained(
        folder,
        recipe,
        model.eval().to(place),
        newest.step,
        weights,
        weights_hash,
        state.get("latents_of"),
    )


def _chosen(folder: Path, recipe: Recipe, which: str) -> checkpoint.Checkpoint | None:
    """The checkpoint that `which` names, None in a folder without any. Raises UserError for one that is not there."""
    checkpoints = folder / "checkpoints"
    if which == "last":
        return checkpoint.newest(checkpoints)
    kept = {one.step: one for one in checkpoint.sound(checkpoints)}
    there = f"it has {', '.join(map(str, kept)) or 'none'}"
    if which != "best":
        if int(which) not in kept:
            raise UserError(f"{folder} has no sound checkpoint of step {which}; {there}")
        return kept[int(which)]
    metric = recipe.training.keep_best or "val/neg_elbo_nats"
    rows = run_folder.read_metrics(folder)
    values = {int(row["step"]): row[metric] for row in rows if metric in row and int(row["step"]) in kept}
    if not values:
        raise UserError(f"no checkpoint of {folder} has a value of {metric} in {run_folder.METRICS}; {there}")
    step = min(values, key=lambda step: (values[step], step))
    if comm.is_main():
        of = (
            ""
            if recipe.training.keep_best
            else "; training.keep_best was not set, so a better one may be deleted"
        )
        say(f"{folder}: step {step} has the smallest {metric} of the checkpoints, {values[step]:.6g}{of}")
    return kept[step]


def _device(name: str | None) -> torch.device:
    """The device of a name. Raises UserError for one that torch does not know or does not see."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device (={name!r}) cannot be used ({reason}); give 'cpu', 'cuda' or 'cuda:N'"
        ) from None
    return device


def refuse_codes(trained: Trained, what: str, remedy: str) -> None:
    """Raise UserError for a run with codes in place of a Gaussian q(z|x), which `what` needs."""
    if trained.model.num_codes:
        raise UserError(
            f"{what} needs a Gaussian q(z|x), and {trained.folder} has codes (posterior.kind "
            f"{trained.recipe.posterior.kind!r}); {remedy}"
        )


def refuse_unlabelled(trained: Trained, reader: ShardReader) -> None:
    """Raise DataError for images without the classes or vectors that a conditional model needs. All ranks call it."""
    condition = trained.model.condition
    if isinstance(condition, ClassCondition) and not condition.dropout:
        refuse_other_classes(reader, condition.classes)
    refuse_unfit_vectors(trained, reader)


def refuse_unfit_vectors(trained: Trained, reader: ShardReader) -> None:
    """Raise DataError for images whose vectors a conditional model does not take. All ranks call it."""
    condition = trained.model.condition
    if reader.vectors is not None and condition is not None:
        refuse_other_vectors(reader, reader.vectors, may_miss=condition.dropout > 0)


def number_of_classes(trained: Trained) -> int | None:
    """K of a run that is given classes; None of any other run."""
    condition = trained.model.condition
    return condition.classes if isinstance(condition, ClassCondition) else None


def refuse_condition(trained: Trained, what: str, remedy: str) -> None:
    """Raise UserError for a conditional run, where `what` has no class to tell it."""
    condition = trained.model.condition
    if condition is not None:
        raise UserError(
            f"{what} has no {condition.kind} for each image, and {trained.folder} is conditional ({condition.words}); {remedy}"
        )


def images_at_once(image_shape: tuple[int, ...]) -> int:
    """The number of images, or sequences, of this shape that a process evaluates in one batch."""
    return min(EVALUATION_BATCH, max(1, EVALUATION_VALUES // math.prod(image_shape)))


def in_order(
    reader: ShardReader, *, workers: int | Workers = 0, images: int | None = None
) -> Generator[Batch]:
    """This rank's share of all images in order, or of the first `images`. Those that cannot be used are reported and masked."""
    reported: set[int] = set()
    rank, world_size = comm.rank(), comm.world_size()
    number = min(len(reader), images or len(reader))
    # Equal batches, as large as they may be: every rank reads as many, and the last one is not mostly padding.
    shape = reader.form.shape if reader.has_windows else reader.image_shape
    batches = -(-number // (world_size * images_at_once(shape)))
    size = world_size * -(-number // (world_size * max(1, batches)))
    for batch in evaluation_batches(
        reader, batch=size, rank=rank, world_size=world_size, workers=workers, images=number
    ):
        tell(batch.faults, reported)
        heartbeat.beat("evaluation")
        yield batch


def draw_seed(recipe: Recipe, split: Split) -> int:
    """The seed of draws from q(z|x).

    Held-out images share no noise with training images: a mixture fitted to the training draws would know the noise of
    the held-out ones.
    """
    return recipe.seed + (HELD_OUT_SEED if split == "val" else 0)


def open_split(recipe: Recipe, split: Split, *, place: str | None = None) -> ShardReader:
    """The reader of one of the recipe's two data sets, or of the shards at `place`, read as the recipe says.

    The training images of several sets, or of balanced classes, are an epoch of the mixture. None are augmented. Raises UserError for another split.
    """
    if split not in get_args(Split):
        raise UserError(f"split (={split!r}) must be 'train' or 'val'")
    if split == "train" and not place:
        return open_mixture(recipe.data, recipe.seed)
    reader = open_reader(place or recipe.data.val, recipe.data)
    if place is not None:  # training counted those of its own sets
        comm.together(lambda: refuse_clipping(reader))
    return reader
