"""Vectors from a table, a row for each image: a CSV file, or CelebA's list_attr_celeba.txt. They become members of the samples.

The first column names the images, as their files are named or as keys of samples; the others are numbers.
"""

import csv
import hashlib
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.items import VECTOR, Item, members_of
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.forward import Streamed
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}$")


class VectorTable(NamedTuple):
    """Vectors float32 [N, V] by row, the rows by key, and the columns' names, empty without a header. origin: for the index."""

    path: Path
    values: NDArray[np.float32]
    rows: dict[str, int]
    columns: tuple[str, ...]
    origin: dict[str, Any]


def read_table(path: Path) -> VectorTable:
    """Read a table. A row of `nan` alone is of an image without a vector.

    Raises DataError for a file that is no table, and for rows with other lengths, with other values that are not finite, or with a name that an
    earlier row has.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--vectors {path} cannot be read: {error.strerror}") from error
    lines = content.decode(errors="replace").splitlines()
    columns: list[str] = []
    if (
        lines and lines[0].strip().isdecimal()
    ):  # CelebA: the number of images, the names of the attributes, rows
        cells = [line.split() for line in lines[1:] if line.strip()]
        columns, cells = (cells[0], cells[1:]) if cells else ([], [])
    else:
        cells = [row for row in csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",") if row]
        if cells and not all(map(_is_number, cells[0][1:])):
            columns, cells = cells[0][1:], cells[1:]
    if not cells or len(cells[0]) < 2:
        raise DataError(
            f"--vectors {path} has no rows of a name and numbers; give a CSV file, or list_attr_celeba.txt"
        )
    size = len(columns) or len(cells[0]) - 1
    wrong = [row for row in cells if len(row) != size + 1 or not (_are_finite(row[1:]) or _are_nan(row[1:]))]
    if wrong:
        raise DataError(
            f"--vectors {path}: {len(wrong)} of {len(cells)} rows are not a name and {size} finite numbers, such as {','.join(wrong[0])[:80]!r}; "
            "mend them, or make all numbers of an image without a vector nan"
        )
    if absent := sum(_are_nan(row[1:]) for row in cells):
        say(f"--vectors {path}: {absent} of {len(cells)} images have no vector, as their rows are nan")
    rows = {key_of(row[0]): number for number, row in enumerate(cells)}
    if len(rows) < len(cells):
        raise DataError(
            f"--vectors {path}: {len(cells) - len(rows)} of {len(cells)} names occur twice; mend them"
        )
    values = np.array([row[1:] for row in cells], dtype=np.float64).astype(np.float32)
    sha256 = hashlib.sha256(content).hexdigest()
    origin = {"file": path.name, "sha256": sha256, "columns": columns or size}
    return VectorTable(path, values, rows, tuple(columns), origin)


def key_of(name: str) -> str:
    """The key of a sample whose file has this name: without its ending, and without dots, at which tars split names."""
    return _ENDING.sub("", name.strip().removeprefix("./")).replace(".", "_")


def with_vectors(source: Source, table: VectorTable) -> Source:
    """The source whose items have a member `vector.npy` each, from the row of SPLIT/KEY, of their key, or of its last part. What is held out
    of train for val may have the row of train/KEY.

    Raises DataError, when a split is listed, for an item without a row, and for two items with one row; UserError for an item
    that has a vector.
    """
    taken: dict[int, tuple[str, str]] = {}
    splits = {}
    for name, split in source.splits.items():
        named = (name, "train") if source.held_out and name == "val" else (name,)
        splits[name] = partial(_of_split, split, partial(_given, named=named, table=table, taken=taken))
    return source._replace(splits=splits)


def listed_before(source: Source) -> Source:
    """The source with all splits listed, so that what is found when one is listed is raised before another is written."""
    ready = {name: split() for name, split in source.splits.items()}

    def once(name: str) -> Split:
        return ready.pop(name) if name in ready else source.splits[name]()

    return source._replace(splits={name: partial(once, name) for name in source.splits})


def _of_split(whole: Callable[[], Split], given: Callable[[Iterable[Item]], Iterator[Item]]) -> Split:
    split = whole()
    if isinstance(split.items, Streamed):
        return split._replace(items=Streamed(list(given(split.items.listed)), split.items.opened))
    if split.outline is not None:  # its keys are known before its images are read
        deque(given(split.outline()), maxlen=0)
    items = given(split.items)
    return split._replace(items=list(items) if isinstance(split.items, list) else items)


def _given(
    items: Iterable[Item], named: tuple[str, ...], table: VectorTable, taken: dict[int, tuple[str, str]]
) -> Iterator[Item]:
    """The items with their vectors. named: the split, and what else its rows may be named after."""
    split = named[0]
    for item in items:
        if any(ending == VECTOR for ending, _ in item.members):
            raise UserError(
                f"--vectors {table.path}: image {item.key} of {split} has a vector of its source already; leave one of them out"
            )
        names = (*(f"{name}/{item.key}" for name in named), item.key, item.key.rpartition("/")[2])
        row = next((table.rows[name] for name in names if name in table.rows), None)
        if row is None:
            raise DataError(
                f"image {item.key} of {split} has no row in {table.path}, whose first names are {', '.join(list(table.rows)[:3])}; add a row "
                "for each image"
            )
        if taken.setdefault(row, (split, item.key)) != (split, item.key):
            raise DataError(
                f"{table.path} has one row for image {item.key} of {split} and image {taken[row][1]} of {taken[row][0]}; name them "
                f"SPLIT/NAME, such as {split}/{item.key}"
            )
        yield item._replace(members=(*item.members, *members_of(table.values, row)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _are_finite(cells: list[str]) -> bool:
    return all(_is_number(cell) and math.isfinite(float(cell)) for cell in cells)


def _are_nan(cells: list[str]) -> bool:
    return all(_is_number(cell) and math.isnan(float(cell)) for cell in cells)
