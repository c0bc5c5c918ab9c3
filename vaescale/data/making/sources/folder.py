"""`folder:PATH`: a tree of images; the first sub-folder is the class."""

import os
from functools import cache, partial
from pathlib import Path, PurePath

from vaescale.data.making.items import Place
from vaescale.data.making.sources.base import SPLIT_NAMES, Source, Split, split_of
from vaescale.data.making.sources.files import holds_images, is_junk, walk
from vaescale.data.making.sources.tree import annotated, tree_split, with_classes
from vaescale.errors import DataError, UserError
from vaescale.system.console import say


def folder(path: Path, *, splits: str | None = None, classes_only: bool = False) -> Source:
    """Every image file below `path`, in a fixed random order.

    Sub-folders with the usual names are splits, whatever their case. splits: the folders of the splits, as
    `train=DIR,val=DIR` below `path`. classes_only: all sub-folders are classes. A class has one number in all splits.
    Raises UserError and DataError where it is not clear what is a split.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the folder that holds the images")
    if splits is not None and classes_only:
        raise UserError("--splits and --classes-only contradict each other; leave one out")
    if splits is not None:
        homes = _given(path, splits)
    else:
        path = _descended(path)
        homes = {} if classes_only else _recognized(path)
    if not homes:
        return tree_source({"train": path})
    if junk := [each.name for each in sorted(path.iterdir()) if is_junk(each.name) and holds_images(each)]:
        say(f"not data in {path}, left out: {', '.join(junk)}")
    return tree_source(homes)


def tree_source(homes: dict[str, Path]) -> Source:
    """The source of a folder for each split, with one numbering of their classes.

    If the folder of one split is inside the folder of another, its files belong to the inner split only.
    """

    def files_of(split: str) -> list[tuple[PurePath, Place]]:
        home = homes[split]
        inner = [each for each in homes.values() if each != home and each.is_relative_to(home)]
        return [
            (file.relative_to(home), Place(file))
            for file in walk(home)
            if not any(file.is_relative_to(other) for other in inner)
        ]

    @cache
    def listed() -> dict[str, Split]:
        files = {split: files_of(split) for split in homes}
        classes = {split: annotated(home) for split, home in homes.items()}
        rows, names = with_classes(files, classes)
        return {split: tree_split(split, found, names) for split, found in rows.items()}

    def one(split: str) -> Split:
        return listed()[split]

    return Source({split: partial(one, split) for split in homes})


def _folders(path: Path) -> list[Path]:
    return [each for each in sorted(path.iterdir()) if each.is_dir() and not is_junk(each.name)]


def _descended(path: Path) -> Path:
    """The folder that holds the splits or classes: `path`, or one below it, since archives often unpack into an extra folder."""
    inside = _folders(path)
    while len(inside) == 1 and not holds_images(path, below=False) and not split_of(inside[0].name):
        below = _folders(inside[0])
        if not below or (len(below) == 1 and holds_images(inside[0], below=False)):
            break
        path, inside = inside[0], below
        say(f"the images are read from {path}")
    return path


def _given(path: Path, splits: str) -> dict[str, Path]:
    """The folders that --splits names."""
    homes: dict[str, Path] = {}
    for part in splits.split(","):
        split, _, name = part.partition("=")
        if split not in SPLIT_NAMES.values() or not name:
            raise UserError(f"--splits (={splits}) must be like train=DIR,val=DIR,test=DIR")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"--splits (={splits}): {name} must be a folder below {path}")
        if not (path / name).is_dir():
            raise DataError(f"--splits (={splits}): {path / name} is not a folder")
        if (home := Path(os.path.normpath(path / name))) in homes.values():
            raise UserError(f"--splits (={splits}) names {name} twice; an image belongs to one split")
        homes[split] = home
    return homes


def _recognized(path: Path) -> dict[str, Path]:
    """The folders with the usual names of splits. Raises DataError if two name one split, or if other images are beside them."""
    homes: dict[str, Path] = {}
    inside = _folders(path)
    named = [(each, split) for each in inside if (split := split_of(each.name)) is not None]
    for each, split in named:
        homes.setdefault(split, each)
    remedy = ",".join(f"{split}={home.name}" for split, home in homes.items())
    remedy += "" if "train" in homes else ",train=DIR"
    remedy = f"with --splits {remedy}, or take all sub-folders as classes with --classes-only"
    for each, split in named:
        if homes[split] != each:
            both = f"{homes[split].name} and {each.name}"
            raise DataError(f"{path} holds {both}, which both name the split {split}; choose one {remedy}")
    strange = [each.name for each in inside if split_of(each.name) is None and holds_images(each)]
    strange += ["images in no folder"] if holds_images(path, below=False) else []
    if homes and strange:
        known = ", ".join(home.name for home in homes.values())
        beside = ", ".join(strange[:3])
        raise DataError(
            f"{path} holds {known} and, beside it, {beside}; name the folders of the splits {remedy}"
        )
    return homes
