"""Image files of a folder as the items of a split."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from vaescale.data.making.items import STREAMED, Clip, Item, Packed, Place
from vaescale.data.making.sources.archives import (
    QUIET_SECONDS,
    ArchivePath,
    TreePath,
    is_archive,
    open_expanded,
    opened,
    place_of,
    without_ending,
)
from vaescale.data.making.sources.base import Split, split_of
from vaescale.data.making.sources.forward import MIXED_BYTES, Streamed
from vaescale.errors import DataError
from vaescale.system.console import Progress, say

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy"),
    *(".avif", ".heic", ".heif", ".jxl"),  # read where Pillow or a package of its own reads them
)
ANNOTATIONS = "_annotations.txt"  # the ending of files with classes, beside the images of Tiny ImageNet's val
SHOWN_EVERY = 1000  # files of a folder between two looks at the clock
PACKED = (".zip", ".tar", ".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".rar", ".7z")
OF_ARRAYS = (".npz", ".mat", ".h5", ".hdf5")
Row = TypeVar("Row")
ARRAYS = ".npy"  # images only where there are no others: beside images, they are masks or features of them


def scan(
    path: TreePath, progress: Callable[[int], None] | None = None
) -> tuple[list[TreePath], list[TreePath]]:
    """The folders and the files in a folder, unsorted. Raises DataError when it cannot be read.

    progress: called with the number of those seen, from time to time; by default it is shown where it takes long.
    """
    if isinstance(path, ArchivePath):
        children = list(path.iterdir())
        return [each for each in children if each.is_dir()], [each for each in children if not each.is_dir()]
    folders: list[TreePath] = []
    files: list[TreePath] = []
    try:
        with ExitStack() as shown, os.scandir(path) as entries:
            for number, entry in enumerate(entries, start=1):
                (folders if entry.is_dir() else files).append(path / entry.name)
                if number % SHOWN_EVERY == 0:
                    progress = progress or shown.enter_context(_listing(path))
                    progress(number)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return folders, files


def counted(what: str, rows: Sequence[Row], *, unit: str = "files") -> Iterator[Row]:
    """The rows one by one, with their progress where it takes long, as with the million files of ImageNet."""
    every = SHOWN_EVERY if unit == "files" else 1
    with Progress(what, len(rows), unit=unit, quiet_seconds=QUIET_SECONDS) as progress:
        for number, row in enumerate(rows, start=1):
            yield row
            if number % every == 0 or number == len(rows):
                progress.update(number)


@contextmanager
def _listing(path: TreePath) -> Iterator[Callable[[int], None]]:
    with Progress(f"list {path}", 0, unit="files", quiet_seconds=QUIET_SECONDS) as progress:
        yield lambda number: progress.update(number)


def inner_folders(path: TreePath) -> list[TreePath]:
    """The folders in a folder, sorted, without junk; also archives that take the place of folders.

    These are archives with the name of a split that no folder has, and a lone archive in a folder without images.
    """
    every, files = scan(path)
    folders = [each for each in every if not is_junk(each.name)]
    archives = [file for file in files if isinstance(file, Path) and is_archive(file)]
    if len(archives) != 1 or holds_images(path):
        splits = {split_of(each.name) for each in folders} | {None}
        archives = [file for file in archives if split_of(without_ending(file.name)) not in splits]
    return sorted([*folders, *map(opened, archives)], key=lambda each: (each.name, str(each)))


def image_files(path: TreePath) -> list[TreePath]:
    """The image files of one folder, sorted."""
    return sorted((file for file in scan(path)[1] if _is_image(file) and not _leads_nowhere(file)), key=str)


def listed_split(files: Sequence[TreePath]) -> Split:
    """A split of these files, without classes."""
    return Split(readable(keyed((file.stem, place_of(file), -1) for file in files)), len(files))


def readable(items: list[Item]) -> list[Item] | Streamed:
    """The items, or a stream of them if they are in a compressed tar, which is read in one pass. Raises DataError."""
    packed = [item.content for item in items if isinstance(item.content, Packed)]
    paths = sorted({each.path for each in packed if each.method == STREAMED})
    if not paths:
        return items
    if len(packed) < len(items) or len(paths) > 1:
        raise DataError(f"one split is in {paths[0]} and elsewhere; unpack this compressed tar")
    if sum(each.size for each in packed) > MIXED_BYTES:
        say(
            f"{paths[0]}: images are mixed only within blocks of {MIXED_BYTES >> 20} MiB, as the tar is compressed; if it is sorted "
            "by class, pack it as zip"
        )
    return Streamed(items, partial(open_expanded, paths[0]))


def walk(path: TreePath, *, where_empty: str = "check the path") -> tuple[list[TreePath], Counter[str]]:
    """All image files below `path`, sorted, and what else is there, by ending, which is said.

    where_empty: the remedy for a folder without any file. Raises DataError without an image.
    """
    files, others = _walk(path)
    if not files:
        raise DataError(
            f"{path} holds no {', '.join(EXTENSIONS)} files; {_instead(path, others, where_empty)}"
        )
    if others:
        named = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5)
        )
        say(f"not images in {path}, left out: {named}")
    return files, others


def is_junk(name: str) -> bool:
    """Whether a folder is one that file managers, servers or notebooks leave, such as @eaDir or __MACOSX."""
    return name.startswith((".", "@", "$")) or name in ("__MACOSX", "#recycle", "lost+found")


def holds_images(path: TreePath, *, below: bool = True) -> bool:
    """Whether there is an image file in a folder; below: or in one of its sub-folders. A folder that cannot be read has none."""
    if not path.is_dir():
        return False
    try:
        folders, files = scan(path)
    except DataError:  # such as lost+found; where images are read from it, this is said then
        return False
    if any(map(_is_image, files)):
        return True
    return below and any(
        holds_images(each) for each in folders if not is_junk(each.name) and not _is_link(each)
    )


def _is_image(file: TreePath) -> bool:
    name = file.name
    return name[name.rfind(".") :].lower() in EXTENSIONS and not name.startswith(".")


def _is_link(path: TreePath) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def _leads_nowhere(file: TreePath) -> bool:
    return _is_link(file) and isinstance(file, Path) and not file.exists()


def _instead(path: TreePath, others: Counter[str], where_empty: str) -> str:
    """A remedy for a folder without images, from what it holds instead."""
    packed = {suffix: count for suffix, count in others.items() if suffix in PACKED}
    named = ", ".join(f"{count} {suffix}" for suffix, count in sorted(packed.items()))
    if isinstance(path, ArchivePath) and packed:
        return f"unpack {path.archive.path}, whose {named} files are archives, and give the folder"
    if isinstance(path, Path):
        if found := next(iter(sorted(path.rglob("*idx3-ubyte*"))), None):
            return f"did you mean idx:{found.parent}?"
        if found := next(iter(sorted(path.rglob("data.mdb"))), None):
            return f"did you mean lsun:{found.parent}?"
        if archives := sorted(file for file in path.rglob("*") if is_archive(file)):
            tars = any(file.suffix == ".tar" for file in archives)
            index = f"; WebDataset tars are indexed with --index-only {archives[0].parent}" if tars else ""
            return f"give one of its archives ({named}), such as {archives[0]}, or unpack them{index}"
        if packed:
            return f"unpack its {', '.join(sorted(packed))} files first"
    if others:
        held = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(3)
        )
        arrays = isinstance(path, ArchivePath) and any(suffix in OF_ARRAYS for suffix in others)
        return f"it holds {held}" + ("; unpack it and give its arrays as arrays:PATH" if arrays else "")
    return where_empty


def _walk(path: TreePath) -> tuple[list[TreePath], Counter[str]]:
    """The image files below `path`, and the number of other files by extension, of those that are not read at all.

    Follows links, but not in circles.
    """
    files: list[TreePath] = []
    others = Counter[str]()
    # With each folder, the real folders on the way to it: to follow a link to one of them would never end.
    pending = [(path, frozenset({_real(path)}))]
    number = linked = 0

    def seen(more: int) -> None:
        progress(number + more)

    with _listing(path) as progress:
        while pending:
            folder, above = pending.pop()
            folders, inside = scan(folder, seen)
            for each in folders:
                if is_junk(each.name):
                    others[f"folders {each.name}"] += 1
                elif (real := _real(each)) not in above:
                    linked += _is_link(each)
                    pending.append((each, above | {real}))
                else:
                    others["links to a folder above"] += 1
            for file in inside:
                if _is_image(file):
                    if _leads_nowhere(file):
                        others["links to files that do not exist"] += 1
                    else:
                        files.append(file)
                elif folder is not path or not file.name.endswith(ANNOTATIONS):
                    others[file.suffix.lower()] += 1
            number += len(inside)
            progress(number)
    if linked:
        say(
            f"{path}: {linked} links to folders are followed; an image that is also elsewhere below {path} counts twice"
        )
    if images := [file for file in files if file.suffix.lower() != ARRAYS]:
        others[ARRAYS] += len(files) - len(images)
        files = images
    return sorted(files), +others


def _real(path: TreePath) -> str:
    return os.path.realpath(path) if isinstance(path, Path) else path.inner


def keyed(items: Iterable[tuple[str, Place | Packed | Clip, int]]) -> list[Item]:
    """Items with unique keys without dots, at which webdataset would split them."""
    result, taken = [], set()
    for name, location, label in items:
        if not name.isprintable():  # lone surrogates, of names that are not UTF-8, are not printable
            name = "".join(letter if letter.isprintable() else "_" for letter in name)
        base = key = name.replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}~{number}"
        taken.add(key)
        result.append(Item(key, location, label))
    return result


def shuffled(items: list[Item]) -> list[Item]:
    """The items in a fixed random order: files are sorted by class, and shards of one class would mix badly."""
    order = np.random.Generator(np.random.Philox(key=len(items))).permutation(len(items))
    return [items[i] for i in order.tolist()]
