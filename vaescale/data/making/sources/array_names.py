"""Which arrays of a set of files are images and labels of which split, by their keys and the names of the files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vaescale.config import Dtype
from vaescale.data.making.sources.array_files import SUFFIXES, open_arrays
from vaescale.data.making.sources.array_images import CHANNELS, MOST_ELONGATED, may_be_images
from vaescale.data.making.sources.base import SPLIT_NAMES, split_of
from vaescale.data.making.sources.hub_columns import LABELS
from vaescale.data.making.sources.stored import Stored
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

IMAGE_WORDS = {
    *("image", "images", "img", "imgs", "x", "data", "input", "inputs", "picture", "pictures", "pixels"),
    *("sample", "samples"),
}
LABEL_WORDS = (*LABELS, "classes", "targets", "categories")
SPLIT_WORDS = {**SPLIT_NAMES, "extra": "extra"}  # SVHN's third part
ORDER = ("train", "val", "test")
MOST_FILES = 1000
MOST_NAMED = 12
MOST_CHANNELS = 4  # of one image


class Named(NamedTuple):
    """An array and what its names tell. bare: the key without the split's name."""

    stored: Stored
    key: str
    bare: str
    split: str

    @property
    def group(self) -> tuple[str, str]:
        """What parts of one array have in common: names of files that differ in numbers only."""
        path = self.stored.path
        return re.sub(r"\d+", "#", path.name), "" if path.suffix.lower() == ".npy" else self.key

    @property
    def order(self) -> tuple[list[int], str]:
        """Where the array comes among the parts of one."""
        name = f"{self.stored.path.name} {self.key}"
        return [int(number) for number in re.findall(r"\d+", name)], name

    def is_called(self, words: Iterable[str]) -> bool:
        """Whether the key consists of such words."""
        parts = [part for part in self.bare.split("_") if not part.isdigit()]
        return bool(parts) and (set(parts) <= {*words} or "_".join(parts) in words)


class Inventory(NamedTuple):
    """The arrays of a set of files, and why others are left out, by key."""

    path: Path
    arrays: list[Named]
    left_out: dict[str, str]

    def listed(self) -> str:
        """The keys with element types and shapes, for messages."""
        every = list(dict.fromkeys(f"{one.key} {one.stored.described()}" for one in self.arrays))
        every += [f"{key} ({why})" for key, why in self.left_out.items()]
        more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
        return ", ".join(every[:MOST_NAMED]) + more


def list_arrays(path: Path) -> Inventory:
    """The arrays of a file, or of the files of a folder and of its folders with names of splits. Raises DataError for none."""
    named: list[Named] = []
    left_out: dict[str, str] = {}
    for file in array_files(path):
        contents = open_arrays(file)
        left_out |= contents.left_out
        folder = [file.parent.name.lower()] if file.parent != path and file != path else []
        for key, stored in contents.arrays.items():
            words = _words(key)
            of_key = (
                SPLIT_WORDS if file.suffix.lower() == ".npy" else SPLIT_NAMES
            )  # other keys may say `extra_data`
            splits = [word for word in words if word in of_key]
            splits += [word for word in (*folder, *_words(file.stem)) if word in SPLIT_WORDS]
            bare = "_".join(word for word in words if word not in of_key)
            split = SPLIT_WORDS[splits[0]] if splits else "train"
            named.append(Named(stored, key, bare, split))
    inventory = Inventory(path, named, left_out)
    if len(named) > 1 and all(
        one.stored.path.suffix == ".npy" and _is_one_image(one.stored) for one in named
    ):
        raise DataError(
            f"the {len(named)} .npy files of {path} hold one image each; did you mean folder:{path}?"
        )
    return inventory


def array_files(path: Path) -> list[Path]:
    """The files of arrays of a folder and of its folders with names of splits, or the file itself. Raises DataError for none."""
    if path.is_file():
        return [path]
    folders = [path, *(each for each in sorted(path.iterdir()) if each.is_dir() and split_of(each.name))]
    files = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file; give a file or the folder of the files")
    if len(files) > MOST_FILES:
        one_each = all(file.suffix.lower() == ".npy" for file in files)
        remedy = f"did you mean folder:{path}?" if one_each else f"give a folder of at most {MOST_FILES}"
        raise DataError(f"{path} holds {len(files)} files of arrays; {remedy}")
    return files


def image_arrays(inventory: Inventory, wanted: str | None, dtype: Dtype = "uint8") -> dict[str, list[Named]]:
    """The arrays of images of each split, in order. wanted: their key, with or without the split's name. dtype: the type of the values.

    Raises UserError for a key that is not there, and DataError where it is not clear which arrays are images.
    """
    named = [one for one in inventory.arrays if one.is_called(IMAGE_WORDS)]
    chosen = [one for one in named if may_be_images(one.stored, dtype)] or named
    if wanted is not None:
        chosen = _by_key(inventory, "image", wanted)
    elif not chosen:
        chosen = [
            one
            for one in inventory.arrays
            if may_be_images(one.stored, dtype) and not one.is_called(LABEL_WORDS)
        ]
    if not chosen:
        raise DataError(
            f"{inventory.path} holds no array of images [N, H, W], [N, H, W, C] or [N, C, H, W], but "
            f"{inventory.listed() or 'nothing'}; save one with numpy.save"
        )
    splits = _by_split(chosen)
    for split, parts in splits.items():
        if len({one.group for one in parts}) > 1:
            names = ", ".join(one.stored.name for one in parts[:3])
            keys = list(dict.fromkeys(one.bare or one.key for one in parts))
            remedy = f"choose with --column image={keys[0]}" if len(keys) > 1 else "give one of the files"
            raise DataError(f"{len(parts)} arrays may be the images of {split}: {names}; {remedy}")
        if len(parts) > 1:
            first, last = parts[0].stored.path.name, parts[-1].stored.path.name
            say(f"{split}: the images are in {len(parts)} files, {first} to {last}")
    return splits


def label_arrays(
    inventory: Inventory, images: dict[str, list[Named]], wanted: str | None
) -> dict[str, list[Named]]:
    """The arrays of labels of each split, one for each array of its images. wanted: their key, or empty for none.

    Raises UserError for a key that is not there.
    """
    if wanted == "":
        return {}
    if wanted is not None:
        chosen = _by_key(inventory, "label", wanted)
    else:
        every = [one for one in inventory.arrays if one.is_called(LABEL_WORDS)]
        first = next((word for word in LABEL_WORDS if any(one.is_called([word]) for one in every)), None)
        chosen = [one for one in every if first is None or one.is_called([first])]
    splits = {name: parts for name, parts in _by_split(chosen).items() if name in images}
    for name, parts in splits.items():
        if len(parts) != len(images[name]):
            where = f"{len(parts)} arrays of labels for {len(images[name])} arrays of images"
            raise DataError(f"{name} of {inventory.path} has {where}; leave them out with --column label=")
    return splits


def vector_arrays(
    inventory: Inventory, images: dict[str, list[Named]], wanted: str | None
) -> dict[str, list[Named]]:
    """The arrays of vectors of each split, one for each array of its images. wanted: their key, or None for no vectors.

    Raises UserError for a key that is not there, and for a split without it.
    """
    if not wanted:
        return {}
    splits = _by_split(_by_key(inventory, "vector", wanted))
    for name, parts in images.items():
        if len(splits.get(name, [])) != len(parts):
            raise UserError(
                f"--column vector={wanted}: {name} of {inventory.path} has {len(splits.get(name, []))} such arrays for {len(parts)} arrays of "
                "images; all splits must have vectors"
            )
    return {name: splits[name] for name in images}


def _by_key(inventory: Inventory, role: str, wanted: str) -> list[Named]:
    exact = [one for one in inventory.arrays if one.key == wanted]
    chosen = exact or [one for one in inventory.arrays if one.bare == "_".join(_words(wanted))]
    if not chosen:
        raise UserError(
            f"--column {role}={wanted}: {inventory.path} has no such array; it holds {inventory.listed()}"
        )
    return chosen


def _by_split(arrays: list[Named]) -> dict[str, list[Named]]:
    names = {one.split for one in arrays}
    order = [name for name in ORDER if name in names] + sorted(names - {*ORDER})
    return {
        name: sorted((one for one in arrays if one.split == name), key=lambda one: one.order)
        for name in order
    }


def _words(name: str) -> list[str]:
    """The lower-case words and numbers of a name: `x_train`, `trainImages/0` and `X` have x, train, images, 0."""
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.findall(r"[a-z]+|\d+", separated)


def _is_one_image(stored: Stored) -> bool:
    """Whether an array is like one image: bytes [H, W], [H, W, 1] or [H, W, 3], and not rows of pixels of many images."""
    shape = stored.shape
    if stored.dtype != "u1" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS)):
        return False
    return max(shape[:2]) <= MOST_ELONGATED * min(shape[:2])


def holds_several(file: Path) -> bool:
    """Whether a .npy file has the shape of several images."""
    try:
        shapes = [stored.shape for stored in open_arrays(file).arrays.values()]
    except DataError:
        return False
    return any(len(shape) == 4 or (len(shape) == 3 and shape[2] > MOST_CHANNELS) for shape in shapes)
