"""The classes of a conditional run, in classes.json of its folder: their names, and p(y), their frequencies in the training images."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.runs.folder import read_json, write_json

CLASSES = "classes.json"


class ClassTable(NamedTuple):
    """The names of K classes, and the share p(y) of each."""

    names: tuple[str, ...]
    frequencies: tuple[float, ...]

    def number_of(self, word: str) -> int:
        """The class of a name or a number. Raises UserError for another word."""
        if word in self.names:
            return self.names.index(word)
        if word.isdecimal() and int(word) < len(self.names):
            return int(word)
        few = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
        raise UserError(
            f"class {word!r} is not a class of this run; give a name or a number from 0 to {len(self.names) - 1}: {few}"
        )


def write(folder: Path, table: ClassTable) -> None:
    """Write the table of a run."""
    write_json(folder / CLASSES, {"names": list(table.names), "frequencies": list(table.frequencies)})


def read(folder: Path, classes: int | None) -> ClassTable:
    """The table of a run with this number of classes, or with any. Raises UserError where it is missing or damaged."""
    content: dict[str, Any] = read_json(folder / CLASSES)
    names, frequencies = content.get("names"), content.get("frequencies")
    sound = (
        isinstance(names, list)
        and isinstance(frequencies, list)
        and len(names) == len(frequencies) == (classes or len(names))
        and all(isinstance(name, str) for name in names)
        and all(isinstance(share, int | float) and 0 <= share <= 1 for share in frequencies)
        and math.isclose(sum(frequencies), 1, abs_tol=1e-6)
    )
    if not sound:
        raise UserError(
            f"{folder / CLASSES} is missing or damaged; copy it from the run that was trained, or start the training command again"
        )
    assert isinstance(names, list)
    assert isinstance(frequencies, list)
    return ClassTable(tuple(names), tuple(map(float, frequencies)))
