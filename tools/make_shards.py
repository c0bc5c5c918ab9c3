"""Write a data set as WebDataset shards with an index beside them: one folder a split, OUT/train, OUT/val, OUT/test.

Plain webdataset reads the tars: images are members KEY.npy (or png, webp, jpg), classes KEY.cls. A stopped call goes
on where it was; a finished split is left as it is, but for shards that are missing or cut: those are written anew.

sources:
  digits            scikit-learn's 1,797 scanned handwritten digits, 8x8 (needs no download)
  idx:PATH          the MNIST family: a folder with train-images-idx3-ubyte[.gz] and so on
  folder:PATH       an image tree; sub-folders are classes; train/, val/, test/ on top are splits
  celeba:PATH       img_align_celeba, with list_eval_partition.txt if it is there; crop 148 (140 is usual, too)
  imagenet:PATH     ILSVRC train/ and val/ of wnid folders or tars; with --size the whole image is averaged down (box),
                    as in the down-sampled ImageNet; --crop square --resample bicubic is short side + centre crop
  hf:NAME[:SPLIT]   a data set of the Hugging Face hub, or a local folder in one of its formats

Without --size images keep their size, and files are stored as they are (training can crop and resize: data.crop).
With --size they are stored as npy, the fastest to read; webp is lossless and half as large.

examples:
  vaescale make-shards digits data/digits --shard-samples 500
  vaescale make-shards celeba:~/celeba data/celeba64 --size 64
  vaescale make-shards imagenet:/data/ILSVRC data/imagenet32 --size 32 --shard-bytes 100MB
  vaescale make-shards --index-only /data/cc12m        index tars made by others, in place
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from vaescale.config import parse_bytes
from vaescale.data.config import Filter
from vaescale.data.index import INDEX, ShardIndex, describe, parse_index
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.base import Source
from vaescale.data.making.writing import (
    Making,
    Written,
    damaged_shards,
    differing,
    index_shards,
    write_shards,
)
from vaescale.data.pictures import Encoding
from vaescale.data.storage import Folder
from vaescale.errors import UserError
from vaescale.system.arguments import add_jobs
from vaescale.system.console import Progress, say

TOLD = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE and OUT, and how images are cut and stored."""
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="digits, KIND:PATH or hf:NAME[:SPLIT]")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="folder that gets a folder a split")
    parser.add_argument("--index-only", metavar="DIR", type=Path, help="index the tars of DIR in place")
    images = parser.add_argument_group("images")
    images.add_argument("--size", type=int, metavar="PIXELS", help="height and width; default: as they are")
    images.add_argument(
        "--crop", metavar="C", help="square, whole or pixels of the centre; default: the source's own"
    )
    images.add_argument("--resample", choices=get_args(Filter), help="default: the source's own")
    images.add_argument(
        "--channels", type=int, choices=(1, 3), help="1: grey, 3: RGB; default: the source's own"
    )
    images.add_argument(
        "--encoding", choices=(*get_args(Encoding), "keep"), help="default: npy with --size, else keep"
    )
    images.add_argument("--quality", type=int, default=95, metavar="Q", help="of jpg, 1 to 100; default: 95")
    images.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be used")
    shards = parser.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument("--shard-samples", type=int, default=1000, metavar="N", help="default: 1000")
    size.add_argument("--shard-bytes", type=_bytes, metavar="SIZE", help="about, such as 100MB")
    shards.add_argument(
        "--holdout",
        type=float,
        default=0.05,
        metavar="F",
        help="fraction for val where a source has none; 0.05",
    )
    shards.add_argument("--config", metavar="NAME", help="configuration of an hf: data set")
    add_jobs(shards, workers="processes")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write each split, or the index alone. Returns the splits' descriptions."""
    _refuse(arguments)
    if arguments.index_only is not None:
        return {"index": _index_only(arguments)}
    source = open_source(arguments.source, holdout=arguments.holdout, config=arguments.config)
    making = _making(arguments, source)
    return {split: _write_split(arguments, source, split, making) for split in source.splits}


def show(result: dict[str, Any]) -> None:
    """One line a split."""
    for split in result.values():
        skipped = f", {split['skipped']} images skipped" if split["skipped"] else ""
        sys.stdout.write(
            f"{split['folder']}: {split['samples']} images {split['image']} in {split['shards']} shards, "
            f"{split['bytes']} bytes, {split['classes']} classes{skipped}\n"
        )


def _write_split(arguments: argparse.Namespace, source: Source, split: str, making: Making) -> dict[str, Any]:
    folder = arguments.out / split
    made = {"source": arguments.source, "split": split}
    if arguments.config is not None:
        made["config"] = arguments.config
    if source.held_out and split in ("train", "val"):
        made["holdout"] = arguments.holdout
    if (folder / INDEX).is_file():
        index = parse_index(Folder(str(folder)).read_index(INDEX), str(folder))
        _refuse_other(index, {**made, **making.words()})
        damaged = damaged_shards(index, folder)
        if not damaged:
            say(f"{folder} is there already ({index.num_samples} samples); delete it to write it anew")
            return _describe(index)
        say(
            f"{folder}: {', '.join(damaged[:3])} missing or damaged; {len(damaged)} of {len(index.shards)} written anew"
        )
    listed = source.splits[split]()
    total = listed.number or 0
    with Progress(f"write {folder}", total) as progress:
        written = write_shards(
            listed.items,
            folder,
            making,
            class_names=listed.class_names,
            jobs=arguments.jobs,
            progress=lambda done: progress.update(done, "images"),
            made=made,
        )
    _tell(written)
    return _describe(written.shards)


def _index_only(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.index_only
    with Progress(f"index {folder}", len(list(folder.glob("*.tar")))) as progress:
        written = index_shards(
            folder,
            skip_broken=arguments.skip_broken,
            jobs=arguments.jobs,
            progress=lambda done: progress.update(done, "shards"),
        )
    _tell(written)
    return _describe(written.shards)


def _describe(index: ShardIndex) -> dict[str, Any]:
    return {**describe(index), "skipped": index.made.get("skipped", 0)}


def _tell(written: Written) -> None:
    for words in written.skipped[:TOLD]:
        say(f"skipped {words}")
    if len(written.skipped) > TOLD:
        say(f"... and {len(written.skipped) - TOLD} more")


def _making(arguments: argparse.Namespace, source: Source) -> Making:
    changed = arguments.size is not None or arguments.channels is not None
    return Making(
        size=arguments.size,
        crop=_parse_crop(arguments.crop) or source.crop if arguments.size else None,
        resample=arguments.resample or source.resample,
        channels=arguments.channels or (source.channels if arguments.size else None),
        encoding=arguments.encoding or ("npy" if changed else "keep"),
        quality=arguments.quality,
        shard_samples=arguments.shard_samples,
        shard_bytes=arguments.shard_bytes,
        skip_broken=arguments.skip_broken,
    )


def _refuse_other(index: ShardIndex, made: dict[str, Any]) -> None:
    before = {name: value for name, value in index.made.items() if name != "skipped"}
    if words := differing(before, made):
        raise UserError(
            f"{index.place} holds shards that were made otherwise ({words}); delete it or choose another OUT"
        )


def _refuse(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not go together."""
    if arguments.index_only is not None and arguments.source is not None:
        raise UserError("--index-only DIR writes no shards; leave SOURCE and OUT out")
    if arguments.index_only is not None and not arguments.index_only.is_dir():
        raise UserError(f"--index-only {arguments.index_only} is not a folder; give the folder of the tars")
    if arguments.index_only is None and arguments.out is None:
        raise UserError("SOURCE and OUT are needed, such as `vaescale make-shards digits data/digits`")
    for name, least, most in (
        *(("size", 1, 16384), ("quality", 1, 100), ("shard_samples", 1, 10**9)),
        *(("shard_bytes", 1, 10**13), ("holdout", 0, 0.9)),
    ):
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} (={value}) must be from {least} to {most}")
    if arguments.size is None and (arguments.crop or arguments.resample):
        raise UserError("--crop and --resample cut to a size; add --size PIXELS")
    if arguments.encoding == "keep" and (arguments.size or arguments.channels):
        raise UserError("--encoding keep stores files as they are; leave --size and --channels out")
    _parse_crop(arguments.crop)


def _parse_crop(word: str | None) -> Any:
    if word is None or word in ("square", "whole"):
        return word
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"--crop (={word}) is square, whole or a number of pixels")
    return int(word)


def _bytes(word: str) -> int:
    try:
        return int(parse_bytes(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: {error}") from None


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
