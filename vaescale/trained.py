"""From a recipe to its parts, and from a run folder back to a trained model."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaescale import comm
from vaescale.aggregate.encoding import encode
from vaescale.data.batch import Batch, Fetched, Request
from vaescale.data.latent_shards import LatentShards
from vaescale.data.loader import evaluation_batches, shard_batches
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.workers import Workers
from vaescale.errors import DataError, UserError
from vaescale.models.build import build_vae
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs import checkpoint
from vaescale.runs import folder as run_folder
from vaescale.system import heartbeat
from vaescale.system.console import Progress
from vaescale.training import launch as backends
from vaescale.training.skips import tell

HELD_OUT_SEED = 1 << 31
EVALUATION_BATCH = 500
EVALUATION_VALUES = 500 * 3072  # larger images come in smaller batches


class Trained(NamedTuple):
    """A trained model and where it came from."""

    folder: Path
    recipe: Recipe
    model: VAE
    step: int
    weights: str
    weights_hash: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The step, the weights and the recipe that results and mixtures of this model record."""
        return {
            "step": self.step,
            "weights": self.weights,
            "weights_hash": self.weights_hash,
            "recipe_hash": self.recipe.hash,
        }

    def title(self, subject: str) -> str:
        """Title of a picture: the run's name, step and weights, and what the picture shows."""
        return f"{self.recipe.name}, step {self.step}, {self.weights} weights: {subject}"


def build_model(recipe: Recipe) -> VAE:
    """The recipe's model with weights from the recipe's seed: the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_vae(
            recipe.network,
            recipe.posterior,
            recipe.likelihood,
            image_size=recipe.data.image_size,
            channels=recipe.data.channels,
            spectral=recipe.objective.reads_spectrum,
        )


def open_trained(folder: Path, *, weights: Literal["ema", "raw"] = "ema") -> Trained:
    """The newest sound checkpoint of a run, in evaluation mode, on a GPU if there is one. All ranks call it, and open the same one.

    weights: `ema` takes the averaged ones when the run has them. Raises UserError when there is nothing to open.
    """
    if not (folder / run_folder.RECIPE).is_file():
        raise UserError(
            f"{folder} is not a run folder (no {run_folder.RECIPE}); give the run_dir of a training run"
        )
    recipe = load_recipe(folder / run_folder.RECIPE)
    found = comm.on_main(lambda: checkpoint.newest(folder / "checkpoints"))
    if found is None:
        raise UserError(
            f"{folder} has no sound checkpoint; train it first: `vaescale train RECIPE run_dir={folder}`"
        )
    model = build_model(recipe)
    taken = "ema" if weights == "ema" and found.has("ema") else "model"
    checkpoint.load_weights(model, found, taken)
    backends.set_precision("fp32")  # torch's own default has TF32 in convolutions
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # An exported run has one kind of weights alone, and says which.
    state = found.state()
    weights = "ema" if taken == "ema" or state.get("exported_weights") == "ema" else "raw"
    weights_hash = str(state.get("exported_weights_hash", found.sha256(taken)))
    return Trained(folder, recipe, model.eval().to(device), found.step, weights, weights_hash)


def in_order(reader: ShardReader, *, workers: int | Workers = 0) -> Iterator[Batch]:
    """All images in order, this rank's share of each batch. What cannot be used is told, and masked."""
    told: set[int] = set()
    rank, world_size = comm.rank(), comm.world_size()
    size = min(EVALUATION_BATCH, max(1, EVALUATION_VALUES // math.prod(reader.image_shape)))
    for batch in evaluation_batches(reader, batch=size, rank=rank, world_size=world_size, workers=workers):
        tell(batch.faults, told)
        heartbeat.beat("evaluation")
        yield batch


def latents_of(
    trained: Trained, split: Literal["train", "val"], *, suffix: str = "", groups: int = 1, draws: int = 0
) -> LatentShards:
    """q(z|x) of every image of a split, in RUN/latents/SPLIT + suffix: written by all ranks together, unless it is there.

    groups, draws: of a ladder's first groups together, so many draws of each image.
    """
    reader = comm.together(lambda: open_split(trained.recipe, split))
    batch = min(EVALUATION_BATCH, max(1, EVALUATION_VALUES // math.prod(reader.image_shape)))
    batch = max(1, batch // max(1, draws))
    total = int(reader.index.shards.samples[comm.rank() :: comm.world_size()].sum())

    def batches(shards: Iterable[int]) -> Iterator[tuple[int, Batch]]:
        told: set[int] = set()
        done = 0
        with Progress(f"encode {split}", total, shown=comm.is_main()) as progress:
            for shard, images in shard_batches(
                reader, shards, batch=batch, workers=trained.recipe.data.workers
            ):
                tell(images.faults, told)
                heartbeat.beat("encoding")
                yield shard, images
                done += len(images.slots)
                progress.update(done, "images")

    made = {
        "run": trained.recipe.name,
        "split": split,
        **trained.identity,
        "data_hash": reader.index.data_hash,
    }
    folder = trained.folder / "latents" / f"{split}{suffix}"
    return encode(
        trained.model,
        reader.index,
        batches,
        folder,
        seed=trained.recipe.seed,
        draw_seed=draw_seed(trained.recipe, split),
        made=made,
        groups=groups,
        draws=draws,
    )


def images_at(reader: ShardReader, numbers: Tensor) -> Tensor:
    """The images with these numbers, uint8 [B, C, H, W]. Raises DataError where one cannot be used."""
    return usable_at(reader, numbers).images


def usable_at(reader: ShardReader, numbers: Tensor) -> Fetched:
    """The samples with these numbers. Raises DataError where one cannot be used: what is measured of the others would be another
    number.
    """
    got = reader.__getitems__(Request(np.asarray(numbers), refill=False))
    if not bool(got.usable.all()):
        raise DataError(
            f"{got.faults[0].words}; write the shards anew, or `vaescale verify-shards DIR --deep` names all that is wrong"
        )
    return got


def draw_seed(recipe: Recipe, split: Literal["train", "val"]) -> int:
    """Of draws of q(z|x). Held-out images share no noise with training images: what is fitted to the one would know the other."""
    return recipe.seed + (HELD_OUT_SEED if split == "val" else 0)


def open_split(recipe: Recipe, split: Literal["train", "val"], *, place: str | None = None) -> ShardReader:
    """The reader of one of the recipe's two data sets, or of the shards at `place`, read as the recipe says."""
    own = recipe.data.train if split == "train" else recipe.data.val
    return open_reader(place or own, recipe.data)
