"""The images of any source, of shards or of a folder of pictures, as batches that a trained run can read."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vaescale import comm
from vaescale.commands.make_shards import refuse_squares, usual_crop
from vaescale.config import Size
from vaescale.data.batch import Batch
from vaescale.data.clipping import refuse_clipping
from vaescale.data.config import Crop, DataConfig, Filter
from vaescale.data.index import INDEX
from vaescale.data.indexes import open_index
from vaescale.data.making.remarks import sentences
from vaescale.data.making.sized import Sizing, sized_batches
from vaescale.data.making.sources import SOURCES, open_source
from vaescale.data.making.sources.base import Source
from vaescale.data.making.storing import Making
from vaescale.data.pictures import to_channels
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import DataError, UserError
from vaescale.recipe import Recipe
from vaescale.system import heartbeat
from vaescale.system.console import say
from vaescale.system.secrets import redact
from vaescale.trained import Trained, images_at_once, in_order
from vaescale.training.skips import tell


class ImageSet(NamedTuple):
    """One split of a source. number: of its images, None where it is known only after reading.

    batches: yields this rank's batches, whose slots begin at 0; all ranks call it. sizing: how the images are brought to the
    run's size, for results. reader: of shards.
    """

    split: str
    class_names: tuple[str, ...]
    number: int | None
    batches: Callable[[], Iterator[Batch]]
    sizing: dict[str, Any]
    reader: ShardReader | None = None


class Choice(NamedTuple):
    """Which images of a source to take, and how. split: its name, None for all; limit: the number of first images of each split;
    crop and resample: None for those of the run.
    """

    split: str | None = None
    limit: int | None = None
    crop: Crop | None = None
    resample: Filter | None = None


def open_images(trained: Trained, source: str, choice: Choice) -> list[ImageSet]:
    """The images of `source`: KIND:PATH as for make-shards, a folder or URL of shards, the folder of their splits, or pictures.

    Raises UserError for a split that the source does not have, DataError for what cannot be read. All ranks call it.
    """
    return comm.together(lambda: _open(trained, source, choice))


def _open(trained: Trained, source: str, choice: Choice) -> list[ImageSet]:
    refuse_squares(trained.recipe.data.image_size, choice.crop)
    if source.partition(":")[0] in SOURCES:
        return _of_source(trained.recipe, source, choice)
    if "://" in source or (Path(source) / INDEX).is_file():
        if choice.split is not None:
            raise UserError(
                f"{source} is one set of shards without splits; leave --split out, or give the folder above it"
            )
        return [_of_shards(trained.recipe, "", source, choice)]
    folders = {path.parent.name: str(path.parent) for path in sorted(Path(source).glob(f"*/{INDEX}"))}
    if folders:
        chosen = _chosen(source, list(folders), choice.split)
        return [_of_shards(trained.recipe, split, folders[split], choice) for split in chosen]
    is_path = Path(source).expanduser().exists()
    return _of_source(trained.recipe, f"folder:{source}" if is_path else source, choice)


def _chosen(source: str, splits: list[str], split: str | None) -> list[str]:
    if split is None:
        return splits
    if split not in splits:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(splits)}")
    return [split]


def _of_shards(recipe: Recipe, split: str, place: str, choice: Choice) -> ImageSet:
    """Shards as the recipe reads them where they fit it, otherwise cropped and resized."""
    index, data = open_index(place), recipe.data
    size, channels = data.image_size, data.channels
    stored = channels if index.image is None else index.image[2]
    crop, resample = data.crop, data.resample
    if choice.crop or (crop is None and (index.image is None or index.image[:2] != data.sides)):
        crop, resample = choice.crop or data.largest_crop, choice.resample or data.resample
    colours: dict[str, Any] = {}
    if channels in (1, 3) and data.dtype == "uint8":
        colours = {"channels": 3 if index.image is None else max(channels, stored)}
    reader = open_reader(
        place, data.model_copy(update={"crop": crop, "resample": resample, "cache": "none", **colours})
    )
    refuse_clipping(reader)
    number = min(len(reader), choice.limit or len(reader))
    batches = partial(_read, reader, data, number)
    sizing = {"size": size, "crop": crop, "resample": resample if crop else None, "channels": channels}
    return ImageSet(
        split, index.class_names, number, batches, {**sizing, "data_hash": index.data_hash}, reader
    )


def _read(reader: ShardReader, data: DataConfig, number: int) -> Iterator[Batch]:
    workers = 0 if data.cache == "memory" else data.workers
    for batch in in_order(reader, workers=workers, images=number):
        if batch.images.shape[1] > data.channels:  # of 8 bits
            grey = [
                torch.from_numpy(to_channels(image, 1, grey_from_colour=True).copy())
                for image in batch.images.permute(0, 2, 3, 1).numpy()
            ]
            batch = batch._replace(images=torch.stack(grey).permute(0, 3, 1, 2))
        yield batch


def _of_source(recipe: Recipe, source: str, choice: Choice) -> list[ImageSet]:
    opened = open_source(source, holdout=0, dtype=recipe.data.dtype)
    if opened.holds == "sequences":
        raise UserError(f"{source} gives sequences, and this reads images; give a source of images")
    sizing, words = _sizing(recipe, source, opened, choice)
    chosen = _chosen(source, list(opened.splits), choice.split)
    return [_of_split(recipe, source, opened, split, sizing, words, choice.limit) for split in chosen]


def _of_split(
    recipe: Recipe,
    source: str,
    opened: Source,
    split: str,
    sizing: Sizing,
    words: dict[str, Any],
    limit: int | None,
) -> ImageSet:
    listed = opened.splits[split]()
    number = listed.number if limit is None or listed.number is None else min(limit, listed.number)
    if listed.left_out:
        others = ", ".join(
            f"{count} {ending or 'without extension'}" for ending, count in listed.left_out.items()
        )
        _say(f"{source} {split}: files that are no images are left out: {others}")

    def batches() -> Iterator[Batch]:
        remarks, reported = Counter[str](), set[int]()
        data = recipe.data
        for batch in sized_batches(
            islice(listed.items, limit),
            sizing,
            batch=images_at_once(data.image_shape),
            rank=comm.rank(),
            world_size=comm.world_size(),
            remarks=remarks,
        ):
            tell(batch.faults, reported)
            heartbeat.beat("scoring")
            yield batch
        for message in sentences(remarks, advise=False):
            _say(f"{source} {split}: {message}")

    return ImageSet(split, listed.class_names, number, batches, words)


def _sizing(recipe: Recipe, source: str, opened: Source, choice: Choice) -> tuple[Sizing, dict[str, Any]]:
    """How the source's images are brought to the run's size: as the run's shards were made, then as its recipe reads them."""
    data, made = recipe.data, _made(recipe)
    kind, made_kind = source.partition(":")[0], str(made.get("source", "")).partition(":")[0]
    crop = made.get("crop")
    if isinstance(crop, int) and kind not in (made_kind, "folder"):
        crop = None  # a number of pixels belongs to the images that it was chosen for
    twice = data.crop is not None and choice.crop is None
    size, crop = _made_size(made) if twice else data.image_size, choice.crop or crop or opened.crop
    making = Making(
        size=size,
        crop=crop if size is None else usual_crop(crop, size),
        resample=choice.resample or made.get("resample") or opened.resample,
        channels=data.channels,
        flatten=made.get("flatten"),
        dtype=data.dtype,
    )
    words: dict[str, Any] = {"size": making.size, "crop": making.crop, "resample": making.resample}
    if making.size is None:
        words = {}
    if twice:
        words |= {"then": {"size": data.image_size, "crop": data.crop, "resample": data.resample}}
    words |= {"channels": data.channels, **({"flatten": making.flatten} if making.flatten else {})}
    reading = (data.crop, data.resample) if twice else (None, making.resample)
    return Sizing(making, data.image_size, *reading), words


def _made_size(made: dict[str, Any]) -> Size | None:
    size = made.get("size")
    return (size[0], size[1]) if isinstance(size, list) else size


def _made(recipe: Recipe) -> dict[str, Any]:
    """How the run's shards were made, from the index of its held-out or training images; empty where neither can be read."""
    fault = None
    for place in (recipe.data.val, *(one.path for one in recipe.data.sets)):
        try:
            return open_index(place).made
        except DataError as error:
            fault = fault or error
    _say(
        f"how the run's images were cut to size is not known ({fault}); the usual crop and filter of the source are used, "
        "--crop and --resample choose others"
    )
    return {}


def _say(message: str) -> None:
    if comm.is_main():
        say(redact(message))
