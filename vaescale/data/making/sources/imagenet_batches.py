"""Down-sampled ImageNet: batches of 8x8 to 64x64 images as published. Chrabaszcz, Loshchilov & Hutter 2017."""

import re
from functools import cache, partial
from pathlib import Path

from vaescale.data.making.sources.array_files import open_arrays
from vaescale.data.making.sources.array_images import BYTES, Part, array_split
from vaescale.data.making.sources.base import Source, Split, report_absent
from vaescale.data.making.sources.cifar import batch_of
from vaescale.data.making.sources.plain_pickle import read_plain
from vaescale.errors import DataError
from vaescale.system.console import say

CLASSES = 1000
BATCHES = 10  # of train
_BATCH = re.compile(r"(train|val)_data(?:_batch_(\d+))?(\.npz)?")
_WNID = re.compile(r"n\d{8}")  # a folder of ILSVRC's own images, of which there are many
_NAMES = "map_clsloc.txt"


def find_batches(path: Path) -> dict[str, list[Path]]:
    """The batches of train and val in order, in `path` or in the folders below it."""
    if not path.is_dir():
        return {}
    inside = [each for each in sorted(path.iterdir()) if each.is_dir() and not _WNID.fullmatch(each.name)]
    found: dict[str, list[tuple[int, Path]]] = {}
    for folder in (path, *inside):
        for file in [*folder.glob("train_data*"), *folder.glob("val_data*")]:
            if (match := _BATCH.fullmatch(file.name)) and file.is_file():
                found.setdefault(match[1], []).append((int(match[2] or 0), file))
    return {split: [file for _, file in sorted(found[split])] for split in ("train", "val") if split in found}


def imagenet_batches(path: Path, batches: dict[str, list[Path]]) -> Source:
    """The splits of pickled or .npz batches {data [N, 3*S*S], labels 1 to 1000}, read one batch after another.

    The labels number the classes as the published map_clsloc.txt does, whose wnids are their names where the file is beside the
    batches or one folder above. Raises DataError for other files.
    """
    for split, files in batches.items():
        numbers = [_BATCH.fullmatch(file.name) for file in files]
        if len({(match[2], match[1]) for match in numbers if match}) < len(files):
            raise DataError(
                f"{path} holds several sets of {split}, such as {files[0]} and {files[1]}; give one folder"
            )
    if "train" in batches and len(batches["train"]) != BATCHES:
        say(f"imagenet:{path}: train has {len(batches['train'])} of {BATCHES} batches")
    names = _names(path, next(iter(batches.values()))[0].parent)

    @cache
    def parts(split: str) -> list[Part]:
        return [_part(file) for file in batches[split]]

    def one(split: str) -> Split:
        found = parts(split)
        if len({part.images.shape for part in found}) > 1:
            raise DataError(f"{path} holds batches of several sizes; give one folder")
        present = {names[number] for part in found for number in set(part.labels)}
        report_absent(split, names, present)
        return array_split(found, names, BYTES)

    return Source({split: partial(one, split) for split in batches}, crop="whole", resample="box", channels=3)


def _part(file: Path) -> Part:
    if file.suffix == ".npz":
        contents = open_arrays(file)
        part = batch_of(file, dict(contents.arrays), "labels")
    else:
        part = batch_of(file, read_plain(file), "labels")
    if any(not 1 <= label <= CLASSES for label in part.labels):
        raise DataError(f"{file} has labels that are not from 1 to {CLASSES}; give the batches as published")
    return Part(part.images, [label - 1 for label in part.labels])


def _names(path: Path, home: Path) -> tuple[str, ...]:
    """The wnids of the classes, or their published numbers."""
    for folder in (home, path, home.parent):
        if (file := folder / _NAMES).is_file():
            rows = [line.split() for line in file.read_text(errors="replace").splitlines()]
            wnids = {row[1]: row[0] for row in rows if len(row) > 1}
            if {*wnids} == {str(number) for number in range(1, CLASSES + 1)}:
                return tuple(wnids[str(number)] for number in range(1, CLASSES + 1))
            raise DataError(
                f"{file} does not name the classes 1 to {CLASSES}; fetch it again or move it away"
            )
    say(
        f"{home}: the classes are named 1 to {CLASSES}, as there is no {_NAMES}; they are not in the order of the wnids"
    )
    return tuple(map(str, range(1, CLASSES + 1)))
