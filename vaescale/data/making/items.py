"""An image to write into a shard: its key and class, and where to read it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import DataError


class Place(NamedTuple):  # its name is part of the hashes in shards' notes (`writing.py`)
    """The file of an image: a whole file, or `bytes` of one from `offset` on."""

    path: Path
    offset: int = 0
    bytes: int = -1


class Item(NamedTuple):
    """One image to write: a unique key, its file or its values uint8 [H, W, C], and its class (-1: none)."""

    key: str
    content: Place | bytes | NDArray[np.uint8]
    label: int


def open_item(item: Item) -> bytes | NDArray[np.uint8]:
    """Read an item's file, or return its values. Raises DataError when the file cannot be read."""
    if not isinstance(item.content, Place):
        return item.content
    try:
        with item.content.path.open("rb") as file:
            file.seek(item.content.offset)
            return file.read(item.content.bytes)
    except OSError as error:
        raise DataError(f"{item.content.path} cannot be read: {error.strerror}") from error
