"""Encode a run's images: the latents q(z|x), or the codes, as shards in the run folder."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vaescale import comm
from vaescale.aggregate import encoding
from vaescale.aggregate.prepared import Preparation, prepare, scale_of
from vaescale.commands.signature import NonNegative, checked
from vaescale.data.batch import Batch
from vaescale.data.code_shards import CodeShards
from vaescale.data.index import describe
from vaescale.data.latent_format import LatentDtype
from vaescale.data.latent_shards import LatentShards
from vaescale.data.loader import shard_batches
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.models import units
from vaescale.models.quantized import QuantizedVAE
from vaescale.system import heartbeat
from vaescale.system.console import Progress
from vaescale.trained import (
    Split,
    Trained,
    Weights,
    Which,
    draw_seed,
    images_at_once,
    open_split,
    open_trained,
    refuse_unlabelled,
)
from vaescale.training import launch
from vaescale.training.skips import tell

SPLITS: tuple[Split, ...] = ("train", "val")


@checked
def encode(
    run: Path,
    *,
    splits: Annotated[Sequence[Split], Field(min_length=1)] = SPLITS,
    weights: Weights = "ema",
    dtype: LatentDtype = "float32",
    flip: Literal["none", "both"] = "none",
    draws: NonNegative = 0,
    standardize: Literal["none", "channel"] = "none",
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Write the latents of a run's images to RUN/latents/SPLIT (SPLIT-WEIGHTS for others than `ema`), unless they exist.

    dtype: of the stored values. flip: `both` adds the latents of each image's mirror image. draws: the number of draws of q(z|x)
    for each image, stored in place of its mean and log variance; 0 stores these. standardize: `channel` shifts and scales each
    channel to mean 0 and standard deviation 1 over the training images. With any of these the latents are in
    RUN/latents/SPLIT-OPTIONS, made from the float32 moments in RUN/latents/SPLIT (and in SPLIT-mirrored). checkpoint: see `Which`.

    Of a run with codes, the shards hold these, int32 [h, w] for each image, and dtype, draws and standardize are refused.

    Returns for each split the folder, the numbers of shards, samples and bytes, the hash, the shape of a latent, the number
    of skipped images, and the mean and standard deviation of the aggregate posterior of each channel; of codes, in place of
    the shape and the moments, their number and the shape of a map. Raises UserError.
    """
    suffix = "" if weights == "ema" else f"-{weights}"
    with launch.joined():
        trained = open_trained(run, weights=weights, which=checkpoint)
        preparation = Preparation(dtype, flip, draws, standardize)
        if trained.model.num_codes:
            _refuse_of_codes(trained, preparation)
            written = {
                split: _summary_of_codes(codes_of(trained, split, suffix=suffix, mirrored=flip == "both"))
                for split in splits
            }
        else:
            written = {split: _summary(_written(trained, split, suffix, preparation)) for split in splits}
    return {
        "run": str(trained.folder),
        "step": trained.step,
        "weights": trained.weights,
        "splits": written,
    }


def _written(trained: Trained, split: Split, suffix: str, preparation: Preparation) -> LatentShards:
    """The latents of a split as `preparation` says; with its defaults, those of `latents_of`."""
    if not preparation.name:
        return latents_of(trained, split, suffix=suffix)

    def views(split: Split) -> list[LatentShards]:
        kinds = (False, True) if preparation.flip == "both" else (False,)
        return [
            latents_of(trained, split, suffix=f"{'-mirrored' * mirrored}{suffix}", mirrored=mirrored)
            for mirrored in kinds
        ]

    mine = views(split)
    # Held-out latents have the scale of the training set, as the model that is trained on them expects.
    scale_views = views("train") if preparation.standardize == "channel" and split != "train" else mine
    return prepare(
        mine,
        trained.folder / "latents" / f"{split}{suffix}-{preparation.name}",
        preparation,
        scale=scale_of(scale_views),
        draw_seed=draw_seed(trained.recipe, split),
    )


def latents_of(
    trained: Trained,
    split: Split,
    *,
    suffix: str = "",
    groups: int = 1,
    draws: int = 0,
    mirrored: bool = False,
) -> LatentShards:
    """Write q(z|x) of every image of a split to RUN/latents/SPLIT + suffix, unless it exists. All ranks call it.

    groups, draws: of a ladder, write `draws` joint draws per image of the first `groups` groups. mirrored: encode the images
    mirrored from left to right.
    """
    recipe = trained.recipe
    reader = _opened(trained, split)
    batch = max(1, images_at_once(reader.image_shape) // max(1, draws))

    def batches(shards: Iterable[int]) -> Iterator[tuple[int, Batch]]:
        found = _batches(reader, shards, split, batch=batch, workers=recipe.data.workers)
        return ((shard, _mirrored(images) if mirrored else images) for shard, images in found)

    origin = _origin(trained, split, reader) | ({"mirrored": True} if mirrored else {})
    return encoding.encode(
        trained.model,
        reader.index,
        batches,
        trained.folder / "latents" / f"{split}{suffix}",
        seed=recipe.seed,
        draw_seed=draw_seed(recipe, split),
        made=origin,
        groups=groups,
        draws=draws,
    )


def codes_of(trained: Trained, split: Split, *, suffix: str = "", mirrored: bool = False) -> CodeShards:
    """Write the codes of every image of a split to RUN/latents/SPLIT + suffix, unless they exist. All ranks call it.

    mirrored: to RUN/latents/SPLIT-both, also those of its mirror image, as KEY_mirrored.
    """
    model, recipe = trained.model, trained.recipe
    assert isinstance(model, QuantizedVAE)
    reader = _opened(trained, split)
    return encoding.encode_codes(
        model,
        reader.index,
        lambda shards: _batches(
            reader,
            shards,
            split,
            batch=images_at_once(reader.image_shape),
            workers=recipe.data.workers,
        ),
        trained.folder / "latents" / f"{split}{suffix}{'-both' * mirrored}",
        seed=recipe.seed,
        made=_origin(trained, split, reader),
        mirrored=mirrored,
    )


def _opened(trained: Trained, split: Split) -> ShardReader:
    """The images of a split, announced."""
    reader = comm.together(lambda: open_split(trained.recipe, split))
    trained.announce("encode", **{split: reader})
    refuse_unlabelled(trained, reader)
    return reader


def _origin(trained: Trained, split: Split, reader: ShardReader) -> dict[str, Any]:
    """The entries of an index that say what was encoded by what."""
    data_hash = reader.index.data_hash
    return {"run": trained.recipe.name, "split": split, **trained.identity, "data_hash": data_hash}


def _refuse_of_codes(trained: Trained, preparation: Preparation) -> None:
    """Raise UserError for options that have no meaning for codes."""
    if preparation._replace(flip="none").name:
        raise UserError(
            f"{trained.folder} has codes (posterior.kind {trained.recipe.posterior.kind!r}), which encode writes as int32 as they are; "
            "leave --dtype, --draws and --standardize out"
        )


def _batches(
    reader: ShardReader, shards: Iterable[int], split: Split, *, batch: int, workers: int
) -> Iterator[tuple[int, Batch]]:
    """Yield the images of some shards with the number of the shard, and show the progress of this rank's share."""
    total = int(reader.index.shards.samples[comm.rank() :: comm.world_size()].sum())
    reported: set[int] = set()
    done = 0
    with Progress(f"encode {split}", total, unit="images", shown=comm.is_main()) as progress:
        for shard, images in shard_batches(reader, shards, batch=batch, workers=workers):
            tell(images.faults, reported)
            heartbeat.beat("encoding")
            yield shard, images
            done += len(images.slots)
            progress.update(done)


def _mirrored(batch: Batch) -> Batch:
    return batch._replace(images=units.mirrored(batch.images))


def _summary_of_codes(shards: CodeShards) -> dict[str, Any]:
    described = describe(shards.index)
    return {
        **{name: described[name] for name in ("folder", "shards", "samples", "bytes", "data_hash")},
        **{name: described["made"][name] for name in ("codes", "code_shape", "skipped", "flip")},
    }


def _summary(shards: LatentShards) -> dict[str, Any]:
    described = describe(shards.index)
    origin = described.pop("made")
    return {
        **{name: described[name] for name in ("folder", "shards", "samples", "bytes", "data_hash")},
        **{name: origin[name] for name in ("latent_shape", "skipped", "mean", "std")},
        "dtype": shards.dtype,
        "draws": shards.draws,
        "flip": origin.get("flip", "none"),
        "standardized": shards.standardized is not None,
    }
