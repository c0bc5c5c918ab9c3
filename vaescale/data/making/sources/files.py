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

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy"),
    *(".avif", ".heic", ".heif", ".jxl"),  # read where Pillow or a package of its own reads them
)
ARRAYS = ".npy"  # images only where there are no others: beside images, they are masks or features of them


def image_files(path: Path) -> list[Path]:
    """The image files of one folder, sorted."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())


def listed_split(files: list[Path]) -> Split:
    """A split of these files, without classes."""
    return Split(keyed((file.stem, Place(file), -1) for file in files), len(files))


def walk(path: Path) -> list[Path]:
    """All image files below `path`, sorted. Counts the other files on stderr. Raises DataError if there is no image."""
    files, others = _walk(path)
    if not files:
        raise DataError(f"{path} holds no {', '.join(EXTENSIONS)} files; {_instead(path, others)}")
    if others:
        kinds = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5)
        )
        say(f"not images in {path}, left out: {kinds}")
    return files


def is_junk(name: str) -> bool:
    """Whether a folder is one that file managers, servers or notebooks leave, such as @eaDir or __MACOSX."""
    return name.startswith((".", "@", "$")) or name in ("__MACOSX", "#recycle", "lost+found")


def holds_images(path: Path, *, below: bool = True) -> bool:
    """Whether there is an image file in a folder; below: or in one of its sub-folders."""
    for _, folders, names in os.walk(path, followlinks=False):
        if any(Path(name).suffix.lower() in EXTENSIONS and name[0] != "." for name in names):
            return True
        if not below:
            return False
        folders[:] = [name for name in folders if not is_junk(name)]
    return False


def _instead(path: Path, others: Counter[str]) -> str:
    """A remedy for a folder without images, from what it holds instead."""
    if found := next(iter(sorted(path.rglob("*idx3-ubyte*"))), None):
        return f"did you mean idx:{found.parent}?"
    if packed := sorted(
        {suffix for suffix in others if suffix in (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")}
    ):
        return f"unpack its {', '.join(packed)} files first"
    if others:
        return f"it holds {', '.join(f'{count} {suffix}' for suffix, count in others.most_common(3))}"
    return "check the path"


def _walk(path: Path) -> tuple[list[Path], Counter[str]]:
    """The image files below `path`, and the number of other files by extension. Follows links, but not in circles."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    files, others = [], Counter[str]()
    # The real folders on the way to each folder: to follow a link to one of them would never end.
    above = {str(path): {os.path.realpath(path)}}
    for parent, folders, names in os.walk(path, followlinks=True, onerror=fail):
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        for name in filter(is_junk, inner):
            others[f"folders {name}"] += 1
        folders[:] = [name for name, real in inner.items() if not is_junk(name) and real not in above[parent]]
        above |= {os.path.join(parent, name): above[parent] | {inner[name]} for name in folders}
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                files.append(Path(parent, name))
            else:
                others[suffix] += 1
    if images := [file for file in files if file.suffix.lower() != ARRAYS]:
        others[ARRAYS] += len(files) - len(images)
        files = images
    return sorted(files), +others


def keyed(items: Iterable[tuple[str, Place, int]]) -> list[Item]:
    """Items with unique keys without dots, at which webdataset would split them."""
    result, taken = [], set()
    for name, location, label in items:
        printable = (
            letter if letter.isprintable() and not "\ud800" <= letter <= "\udfff" else "_" for letter in name
        )
        base = key = "".join(printable).replace(".", "_")
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
