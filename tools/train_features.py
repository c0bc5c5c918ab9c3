"""Train a small classifier on a labelled data set, whose features `vaescale quality` compares images by.

Writes OUT/features.safetensors and OUT/features.json, with the accuracy on held-out images. The same seed gives the same
features on the same kind of machine; numbers by different features do not compare, so keep them.

  vaescale train-features data/digits/train --out features/digits
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import DataError, UserError

if TYPE_CHECKING:
    from vaescale.data.reader import ShardReader

BATCH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR, OUT, how long."""
    parser.add_argument(
        "train", metavar="DIR", help="a folder or URL of labelled shards, such as data/digits/train"
    )
    parser.add_argument(
        "--val", metavar="DIR", help="held-out shards; default: val or test beside DIR, if DIR is a folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="where the features go")
    parser.add_argument("--steps", type=int, default=1000, help=f"batches of {BATCH} images; default: 1000")
    parser.add_argument("--width", type=int, default=32, help="channels of the first map; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write. Returns what features.json says."""
    from vaescale.data.loader import evaluation_batches, training_batches
    from vaescale.data.plan import Plan
    from vaescale.evaluation import classifier
    from vaescale.system.console import Progress

    if arguments.steps < 2 or not 4 <= arguments.width <= classifier.MOST_WIDTH or arguments.seed < 0:
        raise UserError(
            f"--steps must be at least 2, --width from 4 to {classifier.MOST_WIDTH}, --seed at least 0"
        )
    if (arguments.out / classifier.WORDS).exists():
        raise UserError(f"{arguments.out} holds features already; delete it or choose another --out")
    if arguments.out.is_file():
        raise UserError(f"--out {arguments.out} is a file; give a folder")
    train = _open(arguments.train)
    val = _open(arguments.val or _beside(arguments.train))
    if val.image_shape != train.image_shape:
        raise DataError(
            f"the held-out images are {_words(val)}, the others {_words(train)}; give --val a set of the same shape"
        )
    if val.index.data_hash == train.index.data_hash:
        raise DataError("the held-out images are the training images; give --val others")
    classes = _classes(train)
    _classes(val)  # before minutes of training
    shape = classifier.Shape(train.image_shape[0], train.image_shape[1], classes, arguments.width)
    plan = Plan(train.index.shards.samples, min(BATCH, len(train)), arguments.seed)
    batches = training_batches(
        train,
        plan,
        steps=range(arguments.steps),
        rank=0,
        world_size=1,
        accumulation=1,
        workers=0,
    )
    with Progress("train-features", arguments.steps) as progress:

        def told() -> Any:
            for step, batch in enumerate(batches, start=1):
                yield batch
                progress.update(step, f"of {arguments.steps} steps")

        model = classifier.train(shape, told(), steps=arguments.steps, seed=arguments.seed)
    right, count = classifier.accuracy(model, evaluation_batches(val, batch=500, rank=0, world_size=1))
    details = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "accuracy": round(right, 4),
        "held_out_images": count,
        "data_hash": train.index.data_hash,
    }
    sha256 = classifier.save(model, shape, arguments.out, details)
    return {"out": str(arguments.out), "features": model.size, **shape._asdict(), **details, "sha256": sha256}


def _open(place: str) -> "ShardReader":
    """The shards at a place, of the size that all their images have."""
    from vaescale.data.config import DataConfig
    from vaescale.data.reader import open_index, open_reader

    image = open_index(place).image
    if image is None or image[0] != image[1]:
        raise DataError(f"the images of {place} have no one square size; make shards with --size first")
    config = DataConfig(
        train=place, val=place, image_size=image[0], channels=1 if image[2] == 1 else 3, global_batch=BATCH
    )
    return open_reader(place, config)


def _beside(place: str) -> str:
    """The held-out images' folder."""
    for name in ("val", "test"):
        found = Path(place).parent / name
        if (found / "index.json").is_file() and found.resolve() != Path(place).resolve():
            return str(found)
    raise UserError(f"there is neither val nor test beside {place}; give --val")


def _classes(reader: "ShardReader") -> int:
    """How many classes the index names, or the greatest of its entries says. Raises DataError where there are none."""
    named = len(reader.index.class_names)
    classes = named or reader.most_class() + 1
    if classes < 2:
        raise DataError(
            f"the images of {reader.index.place} have no classes; train features on a labelled data set"
        )
    return classes


def _words(reader: "ShardReader") -> str:
    return "x".join(map(str, reader.image_shape))


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
