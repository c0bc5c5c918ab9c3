"""`folder:PATH`: a tree of images, in a folder or an archive; the first sub-folder is the class."""

import os
from collections import Counter
from functools import cache, partial
from pathlib import Path, PurePath

from vaescale.data.making.items import Packed, Place
from vaescale.data.making.sources.archives import ArchivePath, TreePath, is_archive, opened, place_of
from vaescale.data.making.sources.base import SPLIT_NAMES, Source, Split, split_of
from vaescale.data.making.sources.files import counted, holds_images, inner_folders, is_junk, scan, walk
from vaescale.data.making.sources.tree import annotated, tree_split, with_classes
from vaescale.errors import DataError, UserError
from vaescale.system.console import say


def folder(path: Path, *, splits: str | None = None, classes_only: bool = False) -> Source:
    """Every image file below `path`, in a fixed random order.

    Sub-folders with the usual names are splits, whatever their case. splits: the folders of the splits, as
    `train=DIR,val=DIR` below `path`. classes_only: all sub-folders are classes. A class has one number in all splits.
    Raises UserError and DataError where it is not clear what is a split.
    """
    if splits is not None and classes_only:
        raise UserError("--splits and --classes-only contradict each other; leave one out")
    top = opened(path)
    if splits is not None:
        homes = _given(top, splits)
    else:
        top, inside = descended(top)
        homes = {} if classes_only else _recognized(top, inside)
    if not homes:
        return tree_source({"train": top})
    if junk := [each.name for each in scan(top)[0] if is_junk(each.name) and holds_images(each)]:
        say(f"not data in {top}, left out: {', '.join(sorted(junk))}")
    read = {home.archive.path for home in homes.values() if isinstance(home, ArchivePath)}
    beside = [
        each for each in scan(top)[1] if isinstance(each, Path) and is_archive(each) and each not in read
    ]
    if beside:
        say(f"archives in {top}, left out: {', '.join(sorted(each.name for each in beside))}")
    return tree_source(homes)


def tree_source(homes: dict[str, TreePath]) -> Source:
    """The source of a folder for each split, with one numbering of their classes.

    If the folder of one split is inside the folder of another, its files belong to the inner split only.
    """

    def files_of(split: str) -> tuple[list[tuple[PurePath, Place | Packed]], Counter[str]]:
        home = homes[split]
        inner = [each for each in homes.values() if each != home and _is_inside(each, home)]
        files, others = walk(home, where_empty=_leave_out(split, homes))
        mine = (
            file
            for file in counted(f"look at {split}", files)
            if not any(_is_inside(file, other) for other in inner)
        )
        return [(file.relative_to(home), place_of(file)) for file in mine], others  # type: ignore[arg-type]

    @cache
    def listed() -> dict[str, Split]:
        found = {split: files_of(split) for split in homes}
        classes = {split: annotated(home) for split, home in homes.items()}
        rows, names = with_classes({split: files for split, (files, _) in found.items()}, classes)
        return {split: tree_split(split, rows[split], names, others) for split, (_, others) in found.items()}

    def one(split: str) -> Split:
        return listed()[split]

    return Source({split: partial(one, split) for split in homes})


def _leave_out(split: str, homes: dict[str, TreePath]) -> str:
    """What to do about the folder of a split without any file."""
    others = ",".join(f"{each}={_file_name(home)}" for each, home in homes.items() if each != split)
    return f"delete it, or leave it out with --splits {others}" if others else "check the path"


def descended(path: TreePath) -> tuple[TreePath, list[TreePath]]:
    """The folder that holds the splits or classes, and the folders in it: `path`, or one below it, since archives often unpack
    into an extra folder."""
    inside = inner_folders(path)
    while len(inside) == 1 and not holds_images(path, below=False) and not split_of(inside[0].name):
        below = inner_folders(inside[0])
        if not below or (len(below) == 1 and holds_images(inside[0], below=False)):
            break
        path, inside = inside[0], below
        say(f"the images are read from {path}")
    return path, inside


def _is_inside(path: TreePath, folder: TreePath) -> bool:
    if isinstance(path, ArchivePath):
        return path.is_relative_to(folder)
    return isinstance(folder, Path) and path.is_relative_to(folder)


def _unwrapped(home: TreePath, split: str) -> TreePath:
    """The folder of a split: in an archive of its own, often a lone folder with the same name."""
    if isinstance(home, Path) or home.inner:
        return home
    home, inside = descended(home)
    if len(inside) == 1 and split_of(inside[0].name) == split and not holds_images(home, below=False):
        return inside[0]
    return home


def _given(path: TreePath, splits: str) -> dict[str, TreePath]:
    """The folders that --splits names."""
    homes: dict[str, TreePath] = {}
    for part in splits.split(","):
        split, _, name = part.partition("=")
        if split not in SPLIT_NAMES.values() or not name:
            raise UserError(f"--splits (={splits}) must be like train=DIR,val=DIR,test=DIR")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"--splits (={splits}): {name} must be a folder below {path}")
        inner = os.path.normpath(name)
        home = path if inner == "." else path / inner
        if isinstance(home, Path) and home.is_file():
            home = _unwrapped(opened(home), split)
        if not home.is_dir():
            raise DataError(f"--splits (={splits}): {home} is not a folder")
        if home in homes.values():
            raise UserError(f"--splits (={splits}) names {name} twice; an image belongs to one split")
        homes[split] = home
    return homes


def _recognized(path: TreePath, inside: list[TreePath]) -> dict[str, TreePath]:
    """The folders among `inside` with the usual names of splits. Raises DataError if two name one split, or if other images are beside them."""
    homes: dict[str, TreePath] = {}
    named = [(each, split) for each in inside if (split := split_of(each.name)) is not None]
    if not named:
        return {}
    for each, split in named:
        homes.setdefault(split, each)
    remedy = ",".join(f"{split}={_file_name(home)}" for split, home in homes.items())
    remedy += "" if "train" in homes else ",train=DIR"
    remedy = f"with --splits {remedy}, or take all sub-folders as classes with --classes-only"
    for each, split in named:
        if homes[split] != each:
            both = f"{_file_name(homes[split])} and {_file_name(each)}"
            raise DataError(f"{path} holds {both}, which both name the split {split}; choose one {remedy}")
    strange = [_file_name(each) for each in inside if split_of(each.name) is None and holds_images(each)]
    strange += ["images in no folder"] if holds_images(path, below=False) else []
    if strange:
        known = ", ".join(_file_name(home) for home in homes.values())
        beside = ", ".join(strange[:3])
        raise DataError(f"{path} holds {known} and also {beside}; name the folders of the splits {remedy}")
    return {split: _unwrapped(home, split) for split, home in homes.items()}


def _file_name(path: TreePath) -> str:
    """The name of a folder, or of an archive with its ending."""
    return path.name if isinstance(path, Path) or path.inner else path.archive.path.name
