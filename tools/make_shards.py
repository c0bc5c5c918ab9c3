"""Write a data set as WebDataset shards with an index: one folder for each split, OUT/train, OUT/val, OUT/test.

Plain webdataset reads the tars: images are members KEY.npy (or png, webp, jpg), classes KEY.cls. Run the same command
again to continue after a stop: it keeps complete shards and writes those that are missing or damaged.

sources:
  digits            scikit-learn's 1,797 scanned handwritten digits, 8x8 (needs no download)
  idx:PATH          the MNIST family: a folder with train-images-idx3-ubyte[.gz] and so on
  folder:PATH       an image tree; sub-folders are classes; train/, val/, test/ and the like on top are splits
  celeba:PATH       img_align_celeba, with list_eval_partition.txt if present; crop 148 (140 is usual, too)
  imagenet:PATH     ILSVRC train/ and val/ of wnid folders or tars; with --size the whole image is averaged down (box),
                    as in the down-sampled ImageNet; --crop square --resample bicubic resizes the short side and takes
                    the centre
                    also the down-sampled ImageNet: a folder with train_data_batch_1 and so on, pickled or .npz
  hf:NAME[:SPLIT]   a data set of the Hugging Face hub, or a local folder in one of its formats
  arrays:PATH       a .npz, .npy, .mat or .h5 file, or a folder of them: SVHN, MedMNIST, dSprites, 3D Shapes, your own
  cifar:PATH        CIFAR-10 or CIFAR-100, the folder of the Python or the binary version

Without --size images keep their size, and files are stored as they are (training can crop and resize: data.crop).
With --size they are stored as npy, the fastest to read; webp is lossless and half as large.

examples:
  vaescale make-shards digits data/digits --shard-samples 500
  vaescale make-shards celeba:~/celeba data/celeba64 --size 64
  vaescale make-shards imagenet:/data/ILSVRC data/imagenet32 --size 32 --shard-bytes 100MB
  vaescale make-shards --index-only /data/cc12m        index existing tars without writing shards
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from vaescale.data.config import Filter
from vaescale.data.pictures import Encoding
from vaescale.errors import UserError
from vaescale.system.arguments import add_jobs, integer, real
from vaescale.system.console import table

MOST = 10**9
OF_TARS = {"index_dir", "image_member", "class_member"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE and OUT, and the options of images, splits, shards and tars."""
    source = "data set to write: digits, KIND:PATH or hf:NAME[:SPLIT], see the sources above"
    parser.add_argument("source", metavar="SOURCE", nargs="?", help=source)
    parser.add_argument(
        "out", metavar="OUT", nargs="?", type=Path, help="folder for the folders of the splits"
    )
    parser.add_argument(
        "--dry-run", **_flag("write nothing; count images by class, shape and fault of their headers")
    )
    add = parser.add_argument_group("images").add_argument
    add("--size", type=integer(1, 16384), metavar="PIXELS", help="height and width; default: unchanged")
    add("--crop", metavar="C", help="square, whole, or the side of the central square; default: by source")
    add("--resample", choices=get_args(Filter), help="filter for resizing; default: by source")
    add("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for RGB; default: by source")
    stored = (*get_args(Encoding), "keep")
    add("--encoding", choices=stored, help="format of the stored images; default: npy with --size, else keep")
    add("--quality", type=integer(1, 100), metavar="Q", help="quality of jpg images; default: 95")
    add("--flatten", metavar="COLOUR", help="put transparent images on a colour: white, #rrggbb and so on")
    add("--skip-broken", **_flag("skip images that cannot be read, instead of stopping"))
    add = parser.add_argument_group("splits and classes").add_argument
    fraction = "fraction of train for val if there is no val; default: 0.05 if train is alone, else 0"
    add("--holdout", type=real(least=0, most=0.9), metavar="F", help=fraction)
    add("--limit", type=integer(1, MOST), metavar="N", help="only the first N images of each split")
    add("--splits", metavar="DIRS", help="folders of a folder:'s splits, train=DIR,val=DIR; default: by name")
    add("--classes-only", **_flag("take all sub-folders of a folder: as classes, whatever their names"))
    add("--config", metavar="NAME", help="configuration of an hf: data set")
    columns = (
        "columns of hf:, arrays of arrays:, labels of cifar:, as image=NAME,label=NAME; default: by name"
    )
    add("--column", metavar="NAMES", help=columns)
    shards = parser.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group().add_argument
    size(
        "--shard-samples",
        type=integer(1, MOST),
        metavar="N",
        help="number of images in a shard; default: 1000",
    )
    size("--shard-bytes", metavar="SIZE", help="approximate size of a shard, such as 100MB")
    add_jobs(shards, workers="processes")
    add = parser.add_argument_group("tars made by others").add_argument
    add("--index-only", metavar="DIR", type=Path, help="index the tars in DIR, or in DIR/train and so on")
    add("--index-dir", metavar="DIR", type=Path, help="folder of the index; default: beside the tars")
    add("--image-member", metavar="EXT", help="extension of the images; default: usual ones")
    add("--class-member", metavar="NAME", help="cls, EXT, json:FIELD, folder or none; default: by content")


def _flag(words: str) -> dict[str, Any]:
    return {"action": "store_true", "default": None, "help": words}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the shards, or the index alone. Returns a description of each split."""
    from vaescale.commands.make_shards import index_shards, make_shards

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    options.pop("json")
    folder, source, out = (options.pop(name, None) for name in ("index_only", "source", "out"))
    if folder is not None and source is not None:
        raise UserError("--index-only DIR writes no shards; leave SOURCE and OUT out")
    unused = options.keys() - (OF_TARS | {"skip_broken", "jobs"}) if folder else options.keys() & OF_TARS
    if unused:
        where = (
            "shards that are written; leave it out of --index-only" if folder else "--index-only DIR; add it"
        )
        raise UserError(f"--{min(unused).replace('_', '-')} is for {where}")
    if folder is not None:
        return index_shards(folder, **options)
    if out is None:
        raise UserError("SOURCE and OUT are needed, such as `vaescale make-shards digits data/digits`")
    return make_shards(source, out, **options)


def show(result: dict[str, Any]) -> None:
    """Print one line for each split, or a table of what a dry run found."""
    for name, split in result.items():
        if "rows" in split:
            table(f"{name}: {split['images']} images", [*split["rows"].items()])
            continue
        skipped = f", {split['skipped']} images skipped" if split["skipped"] else ""
        sys.stdout.write(
            f"{split['folder']}: {split['samples']} images {split['image']} in {split['shards']} shards, "
            f"{split['bytes']} bytes, {split['classes']} classes{skipped}\n"
        )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
