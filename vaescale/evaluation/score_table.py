"""The scores of many images on disk: sorted and written as CSV or parquet without holding them in memory."""

import csv
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import MissingPackage, UserError
from vaescale.system.files import replacing

SUFFIXES = (".csv", ".parquet")
WORDS = ("name", "split", "class")  # the columns of text
ROWS_AT_ONCE = 10_000


class ScoreTable:
    """A table with a row for each image: name, split, class, whether it is odd, and its scores.

    It is in a private file of SQLite, which is deleted with the table. scores: the names of the columns of numbers.
    """

    def __init__(self, scores: Sequence[str]) -> None:
        self.scores = tuple(scores)
        self._database = sqlite3.connect("")
        columns = [f'"{name}" TEXT' for name in WORDS] + ["odd INTEGER"]
        columns += [f'"{name}" REAL' for name in self.scores]
        self._database.execute(f"CREATE TABLE images (number INTEGER PRIMARY KEY, {', '.join(columns)})")
        self._insert = f"INSERT INTO images VALUES (NULL{', ?' * len(columns)})"  # noqa: S608  # names of the code

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows of (name, split, class or None, odd, *scores)."""
        self._database.executemany(self._insert, rows)

    def count(self) -> int:
        """The number of all images."""
        return self.number(odd=False) + self.number(odd=True)

    def number(self, *, odd: bool) -> int:
        """The number of odd or usual images."""
        (count,) = self._database.execute("SELECT COUNT(*) FROM images WHERE odd = ?", (int(odd),)).fetchone()
        return int(count)

    def values(self, score: str, *, odd: bool) -> NDArray[np.float64]:
        """One score of all odd or all usual images, float64 [N]."""
        query = f'SELECT "{score}" FROM images WHERE odd = ?'  # noqa: S608
        cursor = self._database.execute(query, (int(odd),))
        return np.fromiter((np.nan if value is None else value for (value,) in cursor), np.float64)

    def rows(
        self, sort: str | None, *, lowest_first: bool = False, limit: int = -1
    ) -> Iterator[dict[str, Any]]:
        """The rows by a score, the highest first, or in the order in which they were added. Equal scores keep that order.

        NaN counts as the highest.
        """
        direction = "ASC NULLS LAST" if lowest_first else "DESC NULLS FIRST"
        order = f'"{sort}" {direction}, number' if sort else "number"
        names = (*WORDS, "odd", *self.scores)
        chosen = ", ".join(f'"{name}"' for name in names)
        query = f"SELECT {chosen} FROM images ORDER BY {order} LIMIT ?"  # noqa: S608
        for row in self._database.execute(query, (limit,)):
            values = dict(zip(names, row, strict=True))
            yield values | {"odd": bool(values["odd"])}

    def write(self, path: Path, *, sort: str | None, labelled: bool) -> None:
        """Write all rows to a .csv or .parquet file, whole or not at all. labelled: whether the column `odd` is written."""
        names = [*WORDS, *(["odd"] if labelled else []), *self.scores]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write = _write_parquet if path.suffix == ".parquet" else _write_csv
            write(temporary, names, self.rows(sort))


def check_table_path(path: Path) -> None:
    """Raise UserError for a file that is neither CSV nor parquet, MissingPackage for parquet without pyarrow."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out (={path}) must end with .csv or .parquet")
    if path.suffix == ".parquet":
        _pyarrow()


def _write_csv(path: Path, names: list[str], rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | ({"odd": int(row["odd"])} if "odd" in names else {}))
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(path: Path, names: list[str], rows: Iterator[dict[str, Any]]) -> None:
    arrow, parquet = _pyarrow()
    types = {**dict.fromkeys(WORDS, arrow.string()), "odd": arrow.bool_()}
    schema = arrow.schema([(name, types.get(name, arrow.float64())) for name in names])
    with path.open("wb") as file:
        with parquet.ParquetWriter(file, schema) as writer:
            while chunk := [row for _, row in zip(range(ROWS_AT_ONCE), rows, strict=False)]:
                columns = {name: [row[name] for row in chunk] for name in names}
                writer.write_table(arrow.table(columns, schema))
        file.flush()
        os.fsync(file.fileno())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingPackage("parquet files need pyarrow; pip install pyarrow, or write .csv") from error
    return pyarrow, pyarrow.parquet
