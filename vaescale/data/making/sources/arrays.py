"""`arrays:PATH`: images in .npz, .npy, .mat and .h5 files, such as SVHN, MedMNIST, dSprites and 3D Shapes."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.config import Dtype
from vaescale.data.making.sources.array_files import SUFFIXES
from vaescale.data.making.sources.array_images import (
    BYTES,
    RAW,
    Images,
    Part,
    Scale,
    array_split,
    as_images,
    find_scale,
)
from vaescale.data.making.sources.array_labels import number_of_labels, read_labels, read_vectors
from vaescale.data.making.sources.array_names import (
    Inventory,
    Named,
    image_arrays,
    label_arrays,
    list_arrays,
    vector_arrays,
)
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.hub_columns import Columns, number_classes, parse_columns
from vaescale.errors import DataError
from vaescale.system.console import say


class Wanted(NamedTuple):
    """What --column chooses: keys of arrays, the layout of the images and the column of labels [N, K]; None or empty: nothing."""

    image: str | None
    axes: str | None
    label: str | None
    column: str
    vector: str | None


def arrays(path: Path, *, column: str | None = None, dtype: Dtype = "uint8") -> Source:
    """The images of a .npz, .npy, .mat or .h5 file, or of a folder of them.

    Keys and names of files tell splits, images and labels, as in train_images, x_test and train_32x32.mat; what else there is is
    said. column: `image=KEY[:AXES],label=KEY[.COLUMN]` chooses arrays, the layout of the images such as NHWC, and a column of
    labels [N, K]; `vector=KEY` an array of numbers [N] or [N, V], whose rows become members `vector.npy`. dtype: uint8 scales values whose black and white are plain to 0 to 255; with another type, the type of the arrays,
    values stay as they are. Raises DataError where shapes or values do not tell what the images are, UserError for `column`.
    """
    inventory = list_arrays(path)
    wanted = _wanted(column, inventory)
    named = image_arrays(inventory, wanted.image, dtype)
    labels = label_arrays(inventory, named, wanted.label)
    vectors = vector_arrays(inventory, named, wanted.vector)
    images = {split: _images(named[split], labels.get(split), wanted.axes, dtype) for split in named}
    _report_left_out(inventory, {"image": named, "label": labels, "vector": vectors})
    _report_other_files(path)

    @cache
    def parts() -> tuple[dict[str, list[Part]], tuple[str, ...]]:
        rows, class_names = _numbered(path, images, labels, wanted)
        for split, named in vectors.items():
            rows[split] = [
                part._replace(vectors=read_vectors(one.stored, one.bare or one.key, part.images.number))
                for one, part in zip(named, rows[split], strict=True)
            ]
        return rows, class_names

    @cache
    def scale() -> Scale:
        if dtype != "uint8":
            return RAW
        found = find_scale(next(iter(images.values())))
        if found is not BYTES:
            say(f"arrays:{path}: the values are {found.meaning}; they are stored as 0 to 255")
        return found

    def one(split: str) -> Split:
        rows, class_names = parts()
        return array_split(rows[split], class_names, scale())

    return Source({split: partial(one, split) for split in images})


def _wanted(column: str | None, inventory: Inventory) -> Wanted:
    """`image=KEY[:AXES],label=KEY[.COLUMN],vector=KEY`. A key may contain a dot itself."""
    given = parse_columns(column, ("image", "label", "vector"))
    image = given.get("image", "")
    key, colon, axes = image.rpartition(":") if ":" in image else (image, "", "")
    label, number = given.get("label"), ""
    if label and label not in {name for one in inventory.arrays for name in (one.key, one.bare)}:
        label, _, number = label.rpartition(".") if "." in label else (label, "", "")
    return Wanted(key or None, axes.upper() if colon else None, label, number, given.get("vector"))


def _images(named: list[Named], labels: list[Named] | None, axes: str | None, dtype: Dtype) -> list[Images]:
    """The images of a split, in arrays that agree in the images' shape and element type."""
    numbers = [number_of_labels(one.stored) for one in labels] if labels else [None] * len(named)
    images = [
        as_images(
            one.stored,
            one.bare,
            axes=axes,
            labels=number,
            matlab=one.stored.path.suffix.lower() == ".mat",
            dtype=dtype,
        )
        for one, number in zip(named, numbers, strict=True)
    ]
    for each in images:
        if (each.shape, each.stored.dtype) != (images[0].shape, images[0].stored.dtype):
            raise DataError(
                f"{images[0].stored.name} and {each.stored.name} hold images of different shapes or types; give one of the files"
            )
    return images


def _report_left_out(inventory: Inventory, chosen: dict[str, dict[str, list[Named]]]) -> None:
    """Say which arrays are taken and which are not. chosen: the arrays of each split, by role."""
    taken = {one.stored.name for found in chosen.values() for each in found.values() for one in each}
    rest = [one for one in inventory.arrays if one.stored.name not in taken]
    others = inventory._replace(arrays=rest).listed()
    if others:
        names = [
            f"{role}={'/'.join(dict.fromkeys(one.key for each in found.values() for one in each))}"
            for role, found in chosen.items()
            if found
        ]
        say(
            f"arrays:{inventory.path}: arrays taken: {','.join(names)}; left out: {others} (choose with --column "
            "image=KEY,label=KEY,vector=KEY)"
        )


def _report_other_files(path: Path) -> None:
    """Say which files of a folder are no arrays, by ending."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    others = Counter(file.suffix.lower() for file in files if file.suffix.lower() not in SUFFIXES)
    if others:
        named = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5)
        )
        say(f"no arrays in {path}, left out: {named}")


def _numbered(
    path: Path, images: dict[str, list[Images]], labels: dict[str, list[Named]], wanted: Wanted
) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """The images of each split with their classes, which are numbered over all splits, and the names of the classes."""
    values: dict[str, list[Any]] = {}
    for split, named in labels.items():
        rows = [
            read_labels(one.stored, one.bare, each.number, column=wanted.column, chosen=bool(wanted.label))
            for one, each in zip(named, images[split], strict=True)
        ]
        if all(row is not None for row in rows):
            values[split] = rows

    def flat(split: str) -> Iterator[Any]:
        return (value for row in values[split] for value in row)

    counted: dict[str, Callable[[], Iterator[Any]]] = {split: partial(flat, split) for split in values}
    key = next(iter(labels.values()))[0].key if values else ""
    numbering = number_classes(f"arrays:{path}", counted, Columns("", key))
    parts: dict[str, list[Part]] = {}
    for split, found in images.items():
        if split in values:
            parts[split] = [
                Part(each, [numbering.number(value) for value in row])
                for each, row in zip(found, values[split], strict=True)
            ]
            continue
        parts[split] = [Part(each, [-1] * each.number) for each in found]
        if numbering.class_names:
            say(f"{split} has no classes: there are no labels for it in {path}")
    return parts, numbering.class_names
