"""Image files of a folder as the items of a split."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vaescale.data.making.items import Item, Place
from vaescale.data.making.sources.base import Split
from vaescale.errors import DataError
from vaescale.system.console import say

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def image_files(path: Path) -> list[Path]:
    """The image files of one folder, sorted."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())


def listed_split(files: list[Path]) -> Split:
    """A split of these files, without classes."""
    return Split(keyed((file.stem, Place(file), -1) for file in files), len(files))


def tree_split(path: Path) -> Split:
    """A split of all image files below `path`, in a fixed random order; the first sub-folder is the class."""
    files, others = _walk(path)
    if not files:
        raise DataError(f"{path} holds no {', '.join(EXTENSIONS)} files; check the path")
    if others:
        kinds = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5)
        )
        say(f"not images in {path}, left out: {kinds}")
    parts = [file.relative_to(path).parts for file in files]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    labels = {name: number for number, name in enumerate(names)}
    items = keyed(
        (str(Path(*part).with_suffix("")), Place(file), labels[part[0]] if len(part) > 1 else -1)
        for file, part in zip(files, parts, strict=True)
    )
    return Split(shuffled(items), len(items), names)


def _walk(path: Path) -> tuple[list[Path], Counter[str]]:
    """Image files below `path`, links followed but not in circles; and how many others of which extension."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    files, others = [], Counter[str]()
    above = {
        str(path): {os.path.realpath(path)}
    }  # a folder's own way from the top: a link back up would never end
    for place, folders, names in os.walk(path, followlinks=True, onerror=fail):
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in inner.items() if name[0] != "." and real not in above[place]]
        above |= {os.path.join(place, name): above[place] | {inner[name]} for name in folders}
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                files.append(Path(place, name))
            else:
                others[suffix] += 1
    return sorted(files), others


def keyed(items: Iterable[tuple[str, Place, int]]) -> list[Item]:
    """Keys without dots, where webdataset would split them, each once."""
    result, taken = [], set()
    for name, place, label in items:
        printable = (
            letter if letter.isprintable() and not "\ud800" <= letter <= "\udfff" else "_" for letter in name
        )
        base = key = "".join(printable).replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}~{number}"
        taken.add(key)
        result.append(Item(key, place, label))
    return result


def shuffled(items: list[Item]) -> list[Item]:
    """The items in a fixed random order: files are sorted by class, and shards of one class would mix badly."""
    order = np.random.Generator(np.random.Philox(key=len(items))).permutation(len(items))
    return [items[i] for i in order.tolist()]
