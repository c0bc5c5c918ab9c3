"""Write a data set as WebDataset shards with an index: one folder for each split, OUT/train, OUT/val, OUT/test.

Run the same command again to continue after a stop: it writes the shards that are missing or damaged.

sources:
  digits            scikit-learn's 1,797 scanned handwritten digits, 8x8 (needs no download)
  phantom           2,250 synthetic chest slices, 32x32 int16 in Hounsfield units (needs --dtype int16)
  idx:PATH          the MNIST family: a folder with train-images-idx3-ubyte[.gz] and so on
  stacked:PATH      three images of such a folder as the channels of one: Stacked MNIST, 1,000 modes
  moving-mnist:PATH such a folder's digits, two of them moving in each sequence of frames (Denton & Fergus 2018)
  frames:PATH       clips, a folder of frames for each, or windows of them; folders train, val and test are splits
  bair:PATH         the robot pushing set, train/ and test/ of *.tfrecords (needs no TensorFlow)
  folder:PATH       an image tree, or a zip or tar of one; sub-folders are classes; train/, val/, test/ and the like are splits
  celeba:PATH       img_align_celeba, with list_eval_partition.txt if present; crop 148 (140 is usual, too)
  imagenet:PATH     ILSVRC train/ and val/ of wnid folders or tars; with --size the whole image is averaged down (box);
                    also the down-sampled ImageNet, train_data_batch_1 and so on, pickled or .npz
  lsun:PATH         LSUN's databases, CATEGORY_train_lmdb and CATEGORY_val_lmdb; categories are classes
  hf:NAME[:SPLIT]   a data set of the Hugging Face hub, or a local folder in one of its formats
  arrays:PATH       a .npz, .npy, .mat or .h5 file, or a folder of them: SVHN, MedMNIST, dSprites, 3D Shapes, your own
  cifar:PATH        CIFAR-10 or CIFAR-100, the folder of the Python or the binary version

Without --size files are stored as they are (training can crop and resize: data.crop), otherwise as npy.
  vaescale make-shards celeba:~/celeba data/celeba64 --size 64
  vaescale make-shards --index-only /data/cc12m        index existing tars without writing shards
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from vaescale.config import Dtype
from vaescale.data.config import MOST_CHANNELS, MOST_FRAMES, Filter
from vaescale.data.pictures import Encoding
from vaescale.system.arguments import add_jobs, integer, real, size
from vaescale.system.console import table

MOST = 10**9
SEQUENCES = "{folder}: {samples} sequences of {frames} {image} frames in {shards} shards, {bytes} bytes, {classes} classes"
WRITTEN = "{folder}: {samples} images {image} in {shards} shards, {bytes} bytes, {classes} classes"
FLAG: dict[str, Any] = {"action": "store_true", "default": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE and OUT, and the options of images, splits, shards and tars."""
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="data set to write, see the sources above")
    add("out", metavar="OUT", nargs="?", type=Path, help="folder for the folders of the splits")
    add("--dry-run", **FLAG, help="write nothing; count images by class, shape and fault of their headers")
    add = parser.add_argument_group("images").add_argument
    add(
        "--size", type=size(1, 16384), metavar="S", help="side in pixels, or HEIGHTxWIDTH; default: unchanged"
    )
    add(
        "--crop",
        metavar="C",
        help="square, aspect, whole, or the side of the central square; default: by source",
    )
    add("--resample", choices=get_args(Filter), help="filter for resizing; default: by source")
    channels = "1 for grey, 3 for RGB, 2 and 4 with the alpha channel, up to 16 of arrays; default: by source"
    add("--channels", type=integer(1, MOST_CHANNELS), metavar="C", help=channels)
    kinds = "type of the values, which are kept as they are; default: uint8"
    add("--dtype", choices=get_args(Dtype), help=kinds)
    encodings = (*get_args(Encoding), "keep")
    add("--encoding", choices=encodings, help="format of stored images; default: npy with --size, else keep")
    add("--quality", type=integer(1, 100), metavar="Q", help="quality of jpg images; default: 95")
    add("--flatten", metavar="COLOUR", help="put transparent images on a colour: white, #rrggbb and so on")
    add("--skip-broken", **FLAG, help="skip images that cannot be read, instead of stopping")
    add = parser.add_argument_group("splits and classes").add_argument
    fraction = "part of train for val if there is no val; default: 0.05 if train is alone, else 0"
    add("--holdout", type=real(least=0, most=0.9), metavar="F", help=fraction)
    add("--limit", type=integer(1, MOST), metavar="N", help="only N images of each split, the first ones")
    add("--splits", metavar="DIRS", help="folders of a folder:'s splits, train=DIR,val=DIR; default: by name")
    add("--classes-only", **FLAG, help="take all sub-folders of a folder: as classes, whatever their names")
    add("--config", metavar="NAME", help="configuration of an hf: data set")
    columns = "columns of hf:, arrays of arrays:, labels of cifar:, as image=NAME,label=NAME,vector=NAME; default: by name"
    add("--column", metavar="NAMES", help=columns)
    vectors = (
        "table with a vector for each image, for conditions: CSV of name and numbers, list_attr_celeba.txt"
    )
    add("--vectors", metavar="TABLE", type=Path, help=vectors)
    add = parser.add_argument_group("sequences of moving-mnist:").add_argument
    add("--frames", type=integer(2, MOST_FRAMES), metavar="T", help="frames of a sequence; default: 20")
    numbers = "sequences of train, a tenth as many of val; default: 10000"
    add("--count", type=integer(1, MOST), metavar="N", help=numbers)
    reflected = "reflect digits at walls; default: a new random velocity there"
    add("--deterministic", **FLAG, help=reflected)
    add = parser.add_argument_group("sequences of frames:").add_argument
    add(
        "--window",
        type=integer(2, MOST_FRAMES),
        metavar="T",
        help="frames of a sequence; default: whole clips",
    )
    begins = "frames from the begin of a window to the next one's; default: --window"
    add("--stride", type=integer(1, MOST_FRAMES), metavar="S", help=begins)
    shards = parser.add_argument_group("shards")
    add = shards.add_mutually_exclusive_group().add_argument
    add("--shard-samples", type=integer(1, MOST), metavar="N", help="images in a shard; default: 1000")
    add("--shard-bytes", metavar="SIZE", help="approximate size of a shard, such as 100MB")
    add_jobs(shards, workers="processes")
    add = parser.add_argument_group("tars made by others").add_argument
    add("--index-only", metavar="DIR", type=Path, help="index the tars in DIR, or in DIR/train and so on")
    add("--index-dir", metavar="DIR", type=Path, help="folder of the index; default: beside the tars")
    add(
        "--image-member",
        metavar="EXT",
        help="extension of the images, or frames: numbered ones; default: usual ones",
    )
    add("--class-member", metavar="NAME", help="cls, EXT, json:FIELD, folder or none; default: by content")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the shards, or the index alone. Returns a description of each split."""
    from vaescale.commands.make_shards import index_shards, make_shards, refuse_unused

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    options.pop("json")
    folder, source, out = (options.pop(name, None) for name in ("index_only", "source", "out"))
    refuse_unused(options, folder=folder, source=source, out=out)
    return index_shards(folder, **options) if folder is not None else make_shards(source, out, **options)


def show(result: dict[str, Any]) -> None:
    """Print one line for each split, and the table of its images."""
    for name, split in result.items():
        title = (
            _title(split)
            if "folder" in split
            else f"{name}: {split['images']} {split.get('holds', 'images')}"
        )
        table(title, [*split["rows"].items()])


def _title(split: dict[str, Any]) -> str:
    lengths = [int(frames) for frames in split["made"].get("lengths", ())]
    if not lengths:
        return WRITTEN.format(**split)
    least, most = min(lengths), max(lengths)
    return SEQUENCES.format(frames=least if least == most else f"{least} to {most}", **split)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
