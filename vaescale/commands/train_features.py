"""Train a small classifier on a labelled data set, whose features are used to compare images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vaescale.commands.signature import Count, NonNegative, checked
from vaescale.config import size_of
from vaescale.data.batch import Batch
from vaescale.data.config import DataConfig
from vaescale.data.indexes import open_index
from vaescale.data.loader import evaluation_batches, training_batches
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import DataError, UserError
from vaescale.perceptual import classifier
from vaescale.system.console import Progress, say
from vaescale.system.secrets import redact
from vaescale.trained import shape_text

BATCH, ACCURACY_BATCH = 128, 500
LEAST_WIDTH = 4
QUIET_SECONDS = 2.0


@checked
def train_features(
    train: str,
    *,
    out: Path,
    val: str | None = None,
    steps: Annotated[int, Field(ge=2)] = 1000,
    width: Count = 32,
    seed: NonNegative = 0,
) -> dict[str, Any]:
    """Train a classifier on labelled shards and write its weights and features.json to `out`.

    train, val: folders or URLs of shards; `val` is by default val or test beside `train`. steps: batches of 128 images.
    width: channels of the first map.

    Returns the content of features.json, with the accuracy on the held-out images. Raises UserError when `out` has features,
    DataError for images without classes or of different shapes.
    """
    _refuse(out, width)
    train_reader, val_reader = _open(train), _open(val or _held_out_beside(train))
    classes = _classes_of_both(train_reader, val_reader)
    shape = classifier.Shape(
        train_reader.image_shape[0], size_of(*train_reader.image_shape[1:]), classes, width
    )
    plan = Plan(train_reader.index.shards.samples, min(BATCH, len(train_reader)), seed)
    batches = training_batches(
        train_reader, plan, steps=range(steps), rank=0, world_size=1, accumulation=1, workers=0
    )
    say(
        f"train-features into {out}: {len(train_reader)} images {shape_text(train_reader)} of {redact(train)} and {len(val_reader)} held out, "
        f"{classes} classes; CPU, {steps} steps of {plan.global_batch} images, {plan.steps_per_epoch} to an epoch"
    )
    with Progress("train-features", steps, unit="steps", epoch=plan.steps_per_epoch) as progress:
        model = classifier.train(
            shape,
            batches,
            steps=steps,
            seed=seed,
            report=lambda done, loss: progress.update(done, f"loss {loss:.3f} nats"),
        )
    held_out = evaluation_batches(val_reader, batch=ACCURACY_BATCH, rank=0, world_size=1)
    with Progress(
        "held-out accuracy", len(val_reader), unit="images", quiet_seconds=QUIET_SECONDS
    ) as progress:
        accuracy = classifier.accuracy(model, _shown(held_out, progress))
    details = {
        "steps": steps,
        "seed": seed,
        "accuracy": round(accuracy.plain, 4),
        "balanced_accuracy": round(accuracy.balanced, 4),
        "majority_share": round(accuracy.majority_share, 4),
        "held_out_images": accuracy.images,
        "data_hash": train_reader.index.data_hash,
    }
    sha256 = classifier.save(model, shape, out, details)
    return {"out": str(out), "features": model.size, **shape._asdict(), **details, "sha256": sha256}


def _refuse(out: Path, width: int) -> None:
    """Raise UserError for a width outside the limits of the file format, and for an output folder that has features."""
    if not LEAST_WIDTH <= width <= classifier.MOST_WIDTH:
        raise UserError(f"--width (={width}) must be from {LEAST_WIDTH} to {classifier.MOST_WIDTH}")
    if (out / classifier.DETAILS).exists():
        raise UserError(f"{out} already holds features; delete it or choose another --out")
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder")


def _classes_of_both(train: ShardReader, val: ShardReader) -> int:
    """The number of classes. Raises DataError, before minutes of training, if the data sets do not match."""
    if val.image_shape != train.image_shape:
        raise DataError(
            f"the held-out images are {_shape(val)}, the training images {_shape(train)}; give --val a data set of the same shape"
        )
    if val.index.data_hash == train.index.data_hash:
        raise DataError("the held-out images are the training images; give other images with --val")
    classes = _classes(train)
    _classes(val)
    return classes


def _shown(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """Yield the batches and show the number of images done."""
    done = 0
    for batch in batches:
        yield batch
        done += int(batch.mask.sum())
        progress.update(done)


def _open(location: str) -> ShardReader:
    """A reader of the shards at a folder or URL, in the size of the images. Raises DataError if the sizes differ."""
    index = open_index(location)
    image = index.image
    if image is None:
        raise DataError(
            f"the images of {location} do not all have the same size; write the shards with --size first"
        )
    if index.values.dtype != "uint8":
        raise DataError(
            f"{location} holds {index.values.text()}, and features are trained on uint8; judge such runs with --features pixels"
        )
    config = DataConfig(
        train=location, val=location, image_size=image[:2], channels=image[2], global_batch=BATCH
    )
    return open_reader(location, config)


def _held_out_beside(train: str) -> str:
    """The folder of the held-out images, val or test beside the folder of the training images."""
    for name in ("val", "test"):
        folder = Path(train).parent / name
        if (folder / "index.json").is_file() and folder.resolve() != Path(train).resolve():
            return str(folder)
    raise UserError(f"there is neither val nor test beside {train}; give --val")


def _classes(reader: ShardReader) -> int:
    """The number of classes in the index, or else in its entries. Raises DataError for images without classes."""
    classes = len(reader.index.class_names) or reader.most_class() + 1
    if classes < 2:
        raise DataError(
            f"the images of {reader.index.place} have no classes; train features on a labelled data set"
        )
    return classes


def _shape(reader: ShardReader) -> str:
    return "x".join(map(str, reader.image_shape))
