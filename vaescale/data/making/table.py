"""The table of a split: its images by class, shape and fault, and the files that are no images.

A dry run returns it, and the index of written shards keeps it (`made.table`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vaescale.data.making.items import printable

NOTHING: Mapping[str, int] = MappingProxyType({})
TABLE_KEYS = {"images", "classes", "without_class", "shapes", "more_shapes", "passed_over", "left_out"}
MOST_SHAPES = 20
MOST_SHOWN = 10  # classes and shapes that a row names


class Counts:
    """Counts of images while they are read. Those of several processes are added."""

    def __init__(self) -> None:
        self.classes, self.shapes = Counter[str](), Counter[str]()
        self.faults: dict[str, tuple[int, str]] = {}

    def image(self, shape: str, label: int) -> None:
        """Count an image that can be used. shape: HEIGHTxWIDTHxCHANNELS FORMAT; label: -1 without a class."""
        self.shapes[shape] += 1
        self.classes[str(label)] += 1

    def fault(self, reason: str, sentence: str, number: int = 1) -> None:
        """Count images that cannot be used. sentence: on the first one."""
        count, first = self.faults.get(reason, (0, sentence))
        self.faults[reason] = count + number, first

    def content(self) -> dict[str, Any]:
        """The counts for JSON."""
        return {"classes": self.classes, "shapes": self.shapes, "faults": self.faults}

    def add(self, content: Mapping[str, Any]) -> None:
        """Add what `content` returned."""
        self.classes.update(content["classes"])
        self.shapes.update(content["shapes"])
        for reason, (number, first) in content["faults"].items():
            self.fault(reason, first, number)

    def table(self, class_names: Sequence[str], left_out: Mapping[str, int]) -> dict[str, Any]:
        """The table for people and JSON. left_out: numbers of files that are no images, by ending.

        `images`, the number of those that can be used; `classes`, their numbers by name, and `without_class`; `shapes`, their
        numbers by HEIGHTxWIDTHxCHANNELS FORMAT, the most frequent first, and the number of `more_shapes`; `passed_over`, for each
        reason the number of images and the sentence of the first; `left_out`.
        """
        faults = self.faults.items()
        return {
            "images": self.shapes.total(),
            "classes": {name: self.classes[str(label)] for label, name in enumerate(class_names)},
            "without_class": self.classes["-1"],
            "shapes": dict(self.shapes.most_common(MOST_SHAPES)),
            "more_shapes": max(0, len(self.shapes) - MOST_SHAPES),
            "passed_over": {reason: {"images": count, "first": first} for reason, (count, first) in faults},
            "left_out": dict(left_out),
        }


def table_rows(table: Mapping[str, Any]) -> dict[str, str]:
    """A table in words, a row for each kind of count that is not empty."""
    classes = table["classes"] | ({"without class": table["without_class"]} if table["without_class"] else {})
    shapes = ", ".join(f"{shape} ({count})" for shape, count in list(table["shapes"].items())[:MOST_SHOWN])
    more = max(0, len(table["shapes"]) - MOST_SHOWN) + table["more_shapes"]
    rows = {"classes": _classes(classes), "shapes": shapes + (f" and {more} more" if more else "")}
    rows["left out"] = ", ".join(
        f"{count} {ending or 'without extension'}" for ending, count in table["left_out"].items()
    )
    faults = table["passed_over"].items()
    rows |= {f"cannot be used: {why}": f"{one['images']}, first: {one['first']}" for why, one in faults}
    return {name: row for name, row in rows.items() if row}


def _classes(classes: Mapping[str, int]) -> str:
    if set(classes) == {"without class"}:
        return "none"
    named = ", ".join(f"{printable(name)} {count}" for name, count in list(classes.items())[:MOST_SHOWN])
    more = len(classes) - MOST_SHOWN
    if more <= 0:
        return named
    return f"{len(classes)} of {min(classes.values())} to {max(classes.values())} images: {named} and {more} more"
