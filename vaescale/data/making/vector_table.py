"""Vectors from a table, a row for each image: a CSV file, or CelebA's list_attr_celeba.txt. They become members of the samples.

The first column names the images, as their files are named or as keys of samples; the others are numbers.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.items import VECTOR, Item, members_of
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.forward import Streamed
from vaescale.errors import DataError, UserError

_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}$")


class VectorTable(NamedTuple):
    """Vectors float32 [N, V] by row, the rows by key, and the columns' names, empty without a header. origin: for the index."""

    path: Path
    values: NDArray[np.float32]
    rows: dict[str, int]
    columns: tuple[str, ...]
    origin: dict[str, Any]


def read_table(path: Path) -> VectorTable:
    """Read a table. Raises DataError for a file that is none, and for rows of other lengths, NaN and names that occur twice."""
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
    wrong = [row for row in cells if len(row) != size + 1 or not all(map(_is_number, row[1:]))]
    if wrong:
        raise DataError(
            f"--vectors {path}: {len(wrong)} of {len(cells)} rows are not a name and {size} finite numbers, such as {','.join(wrong[0])[:80]!r}; "
            "mend them"
        )
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
    """The source whose items have a member `vector.npy` each, from the row of SPLIT/KEY, of their key, or of its last part.

    Raises DataError, when a split is listed, for an item without a row, and for two items with one row; UserError for an item
    that has a vector.
    """
    taken: dict[int, tuple[str, str]] = {}
    splits = {name: partial(_of_split, split, name, table, taken) for name, split in source.splits.items()}
    return source._replace(splits=splits)


def _of_split(whole: Any, name: str, table: VectorTable, taken: dict[int, tuple[str, str]]) -> Split:
    split: Split = whole()
    if isinstance(split.items, Streamed):
        listed = list(_given(split.items.listed, name, table, taken))
        return split._replace(items=Streamed(listed, split.items.opened))
    items = _given(split.items, name, table, taken)
    return split._replace(items=list(items) if isinstance(split.items, list) else items)


def _given(
    items: Iterable[Item], split: str, table: VectorTable, taken: dict[int, tuple[str, str]]
) -> Iterator[Item]:
    for item in items:
        if any(ending == VECTOR for ending, _ in item.members):
            raise UserError(
                f"--vectors {table.path}: image {item.key} of {split} has a vector of its source already; leave one of them out"
            )
        names = (f"{split}/{item.key}", item.key, item.key.rpartition("/")[2])
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
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
