"""Train a small classifier on a labelled data set, whose features are used to compare images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from vaescale.commands.signature import Count, NonNegative, checked
from vaescale.config import size_of
from vaescale.data.batch import Batch
from vaescale.data.config import MOST_FRAMES, DataConfig
from vaescale.data.index import SEQUENCES
from vaescale.data.indexes import open_index
from vaescale.data.loader import evaluation_batches, training_batches
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.sequences import lengths_of
from vaescale.errors import DataError, UserError
from vaescale.perceptual import classifier, video_classifier
from vaescale.perceptual.video_classifier import LEAST_FRAMES, all_frames, drawn_frames
from vaescale.system.console import Progress, say
from vaescale.system.secrets import redact
from vaescale.trained import noun_of, shape_text

BATCH, ACCURACY_BATCH = 128, 500
VIDEO_BATCH = 32
LEAST_WIDTH = 4
QUIET_SECONDS = 2.0


@checked
def train_features(
    train: str,
    *,
    out: Path,
    val: str | None = None,
    frames: Annotated[int, Field(ge=LEAST_FRAMES, le=MOST_FRAMES)] | None = None,
    steps: Annotated[int, Field(ge=2)] = 1000,
    width: Count = 32,
    seed: NonNegative = 0,
) -> dict[str, Any]:
    """Train a classifier on labelled shards and write its weights and features.json to `out`. Of sequences there are two: one of frames,
    drawn from each sequence, and one of videos, on its maps, which is written to videos.json and its weights beside it.

    train, val: folders or URLs of shards; `val` is by default val or test beside `train`. frames: of a video, by default those of the
    shortest sequence. steps: batches of 128 images or frames, and as many of 32 videos. width: channels of the first map.

    Returns the content of features.json, with the accuracy on the held-out images. Raises UserError when `out` has features,
    DataError for images without classes or of different shapes.
    """
    _refuse(out, width)
    (out / video_classifier.DETAILS).unlink(missing_ok=True)  # of a training that was killed
    train_reader = _open(train, frames)
    val_reader = _open(val or _held_out_beside(train), _frames_of(train_reader), like=train_reader)
    classes = _classes_of_both(train_reader, val_reader)
    shape = classifier.Shape(
        train_reader.image_shape[0], size_of(*train_reader.image_shape[1:]), classes, width
    )
    plan = Plan(train_reader.index.shards.samples, min(BATCH, len(train_reader)), seed)
    videos = train_reader.has_windows
    each = "one frame of each of " if videos else ""
    say(
        f"train-features into {out}: {len(train_reader)} {noun_of(train_reader)} {shape_text(train_reader)} of {redact(train)} and {len(val_reader)} held out, "
        f"{classes} classes; CPU, {steps} steps of {each}{plan.global_batch} {'sequences' if videos else 'images'}, {plan.steps_per_epoch} to an epoch"
    )
    batches = _training(train_reader, plan, steps)
    with _shown_steps("train-features", steps, plan) as report:
        model = classifier.train(
            shape,
            drawn_frames(batches, seed=seed) if videos else batches,
            steps=steps,
            seed=seed,
            report=report,
        )
    details = {"steps": steps, "seed": seed, **_accuracy(model, classes, val_reader, of_frames=videos)}
    details["data_hash"] = train_reader.index.data_hash
    of_videos = {}
    if videos:  # before features.json, without which there are no features
        of_videos["videos"] = _train_videos(model, shape, train_reader, val_reader, out, steps, seed)
    sha256 = classifier.save(model, shape, out, details)
    return {
        "out": str(out),
        "features": model.size,
        **shape._asdict(),
        **details,
        "sha256": sha256,
        **of_videos,
    }


def _train_videos(
    frame: classifier.Classifier,
    shape: classifier.Shape,
    train: ShardReader,
    val: ShardReader,
    out: Path,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train and write the classifier of videos. Returns its details."""
    plan = Plan(train.index.shards.samples, min(VIDEO_BATCH, len(train)), seed)
    with _shown_steps("train-features, videos", steps, plan) as report:
        model = video_classifier.train(
            frame, shape, _training(train, plan, steps), steps=steps, seed=seed, report=report
        )
    details = {"frames": _frames_of(train), **_accuracy(model, shape.classes, val, of_frames=False)}
    held_out = evaluation_batches(val, batch=VIDEO_BATCH, rank=0, world_size=1)
    details["order_accuracy"] = round(video_classifier.order_accuracy(model, held_out, seed=seed), 4)
    return {**details, "sha256": video_classifier.save(model, out, details)}


def _training(reader: ShardReader, plan: Plan, steps: int) -> Iterator[list[Batch]]:
    return training_batches(reader, plan, steps=range(steps), rank=0, world_size=1, accumulation=1, workers=0)


@contextmanager
def _shown_steps(name: str, steps: int, plan: Plan) -> Iterator[Callable[[int, float], None]]:
    """Show the progress of a training: a function of the steps done and the loss."""
    with Progress(name, steps, unit="steps", epoch=plan.steps_per_epoch) as progress:
        yield lambda done, loss: progress.update(done, f"loss {loss:.3f} nats")


def _accuracy(
    model: Callable[[Tensor], Tensor], classes: int, val: ShardReader, *, of_frames: bool
) -> dict[str, Any]:
    """The accuracy on the held-out set. of_frames: of each frame of its sequences."""
    batch = VIDEO_BATCH if val.has_windows else ACCURACY_BATCH
    batches = evaluation_batches(val, batch=batch, rank=0, world_size=1)
    unit = _unit(val, of_frames=False)
    with Progress("held-out accuracy", len(val), unit=unit, quiet_seconds=QUIET_SECONDS) as progress:
        shown = _shown(batches, progress)
        accuracy = classifier.accuracy(model, classes, all_frames(shown) if of_frames else shown)
    return {
        "accuracy": round(accuracy.plain, 4),
        "balanced_accuracy": round(accuracy.balanced, 4),
        "majority_share": round(accuracy.majority_share, 4),
        f"held_out_{_unit(val, of_frames=of_frames)}": accuracy.images,
    }


def _unit(val: ShardReader, *, of_frames: bool) -> str:
    return "frames" if of_frames else "sequences" if val.has_windows else "images"


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


def _open(location: str, frames: int | None, like: ShardReader | None = None) -> ShardReader:
    """A reader of the shards at a folder or URL, in the size of the images; of sequences windows of `frames`, by default of the shortest
    sequence's. like: the training set's, where this is the held-out one. Raises DataError if sizes or kinds differ, UserError for
    frames where there are none.
    """
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
    of_sequences = index.made.get("kind") == SEQUENCES
    if like is not None and like.has_windows != of_sequences:
        kinds = ("sequences", "images") if of_sequences else ("images", "sequences")
        raise DataError(
            f"the held-out set {location} holds {kinds[0]}, the training set {kinds[1]}; give --val a set of the same kind"
        )
    if of_sequences:
        frames = frames or min(lengths_of(index))
        if frames < LEAST_FRAMES:
            raise DataError(
                f"{location} has sequences of {frames} frames; features need {LEAST_FRAMES} at least"
            )
    elif frames is not None:
        raise UserError(f"--frames (={frames}) is for sequences, and {location} holds images; leave it out")
    config = DataConfig(
        train=location,
        val=location,
        image_size=image[:2],
        channels=image[2],
        global_batch=BATCH,
        holds="sequences" if of_sequences else "images",
        frames=frames,
    )
    return open_reader(location, config)


def _frames_of(reader: ShardReader) -> int | None:
    """T of a reader of sequences."""
    return reader.form.shape[0] if reader.has_windows else None


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
