"""Classes and splits of image files from their paths alone.

A file is a `Listed`: its path below the folder of its split, and where to read it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from vaescale.data.making.items import Packed, Place
from vaescale.data.making.sources.archives import TreePath
from vaescale.data.making.sources.base import Split, report_absent
from vaescale.data.making.sources.files import ANNOTATIONS, counted, keyed, readable, shuffled
from vaescale.data.making.table import NOTHING
from vaescale.system.console import say

_CHARACTER = re.compile(r"character\d\d")  # Omniglot's folders within those of alphabets: Lake et al. 2015


class Listed(NamedTuple):
    """An image file. inner: its path below the folder of its split. class_name: empty without a class."""

    inner: PurePath
    place: Place | Packed
    class_name: str


def annotated(path: TreePath) -> dict[str, str]:
    """Class names by file name from `*_annotations.txt` (a file and a class in each line), as in Tiny ImageNet's val."""
    classes: dict[str, str] = {}
    files: list[TreePath] = [*path.glob(f"*{ANNOTATIONS}")]
    for file in sorted(files, key=str):
        rows = (line.split("\t") for line in file.read_text(errors="replace").splitlines())
        classes |= {row[0]: row[1].strip() for row in rows if len(row) > 1}
    return classes


def with_classes(
    files: Mapping[str, Sequence[tuple[PurePath, Place | Packed]]], classes: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, list[Listed]], tuple[str, ...]]:
    """The files of each split with their classes, and the names of all classes in order.

    files: (path below the split's folder, place) by split. classes: class names by file name, by split, for splits whose
    classes are in a file. In other splits the first folder is the class, and of Omniglot the first two. If all images of a split are in one folder, that
    folder is a class only if another split has it beside other classes.
    """
    listed, several = {}, set[str]()
    for split, pairs in files.items():
        known = classes.get(split, {})
        depth = 2 if all(map(_is_omniglot, (inner for inner, _ in pairs))) else 1
        if depth == 2 and pairs:
            say(f"{split}: classes are ALPHABET/characterNN, as in Omniglot")
        listed[split] = [
            Listed(inner, place, known.get(inner.name, "") if known else "/".join(inner.parts[:-1][:depth]))
            for inner, place in pairs
        ]
        names = {one.class_name for one in listed[split]}
        several |= names - {""} if len(names) > 1 or known or depth == 2 else set()
    for split, rows in listed.items():
        if lone := {one.class_name for one in rows} - {""} - several:
            say(f"{split}: all images are in one folder, {lone.pop()}, which is no class")
            listed[split] = [one._replace(class_name="") for one in rows]
    return listed, tuple(sorted(several))


def _is_omniglot(inner: PurePath) -> bool:
    return len(inner.parts) == 3 and _CHARACTER.fullmatch(inner.parts[1]) is not None


def tree_split(
    split: str, rows: list[Listed], names: tuple[str, ...], left_out: Mapping[str, int] = NOTHING
) -> Split:
    """A split of these files in a fixed random order, its classes numbered by `names`. Says which classes have no image.

    left_out: numbers of other files, by ending.
    """
    labels = {name: number for number, name in enumerate(names)}
    report_absent(split, names, {one.class_name for one in rows})
    without = sum(not one.class_name for one in rows)
    if names and 0 < without < len(rows):
        say(f"{without} of {len(rows)} images of {split} have no class")
    items = keyed(
        (str(one.inner.with_suffix("")), one.place, labels.get(one.class_name, -1))
        for one in counted(f"name {split}", rows)
    )
    return Split(readable(shuffled(items)), len(items), names, left_out)
