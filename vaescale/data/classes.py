"""The classes of a set's images, counted before a conditional model is trained or sampled from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vaescale import comm
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError
from vaescale.system.console import say


class ClassCounts(NamedTuple):
    """The number of images of each class; of images without a class; and of those with a class of `len(of_class)` or more."""

    of_class: tuple[int, ...]
    without: int
    beyond: int

    def names(self, known: Sequence[str]) -> tuple[str, ...]:
        """A name for each class: that of the set, or its number."""
        return tuple(
            known[number] if number < len(known) else str(number) for number in range(len(self.of_class))
        )

    @property
    def frequencies(self) -> tuple[float, ...]:
        """p(y): the share of each class among the images that have one."""
        total = sum(self.of_class)
        return tuple(count / total for count in self.of_class)


def count_classes(reader: ShardReader, classes: int) -> ClassCounts:
    """Count the classes of a set from its entries. All ranks call it, and the first one reads."""

    def counted() -> ClassCounts:
        labels = reader.labels()
        known = labels[(labels >= 0) & (labels < classes)]
        of_class = tuple(np.bincount(known, minlength=classes).tolist())
        return ClassCounts(of_class, int((labels < 0).sum()), int((labels >= classes).sum()))

    return comm.on_main(counted)


def refuse_other_classes(reader: ShardReader, classes: int) -> ClassCounts:
    """Raise DataError unless each image of a set has one of the classes. Says which classes have no image. All ranks call it."""
    counts, number = count_classes(reader, classes), len(reader)
    if counts.without:
        raise comm.known_to_all(
            DataError(
                f"{counts.without} of {number} images of {reader.index.place} have no class, which condition.kind=class needs; write "
                "the shards from a source with classes, or leave condition out"
            )
        )
    if counts.beyond:
        raise comm.known_to_all(
            DataError(
                f"{counts.beyond} of {number} images of {reader.index.place} have a class above {classes - 1}; set condition.classes "
                "to the number of classes"
            )
        )
    missing = [number for number, count in enumerate(counts.of_class) if not count]
    if missing and comm.is_main():
        few = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        say(f"{len(missing)} of condition.classes (={classes}) have no image in {reader.index.place}: {few}")
    return counts
