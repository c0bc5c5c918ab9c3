"""An image to write into a shard: its key and class, and where to read it."""

import io
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.pictures import PictureFault, Values
from vaescale.errors import DataError

MOST_FILE_BYTES = 1 << 29  # of a file in an archive: more than any image of MAX_PIXELS takes
STORED, DEFLATED = 0, 8  # methods of a zip
STREAMED = -1  # of a compressed tar, which expands only as a whole
_ZIP_HEADER_BYTES = 30  # of a file in a zip, before its name


class Place(NamedTuple):  # its name is part of the hashes in shards' notes (`writing.py`)
    """The file of an image: a whole file, or `bytes` of one from `offset` on."""

    path: Path
    offset: int = 0
    bytes: int = -1


class Packed(NamedTuple):
    """A file in an archive. path, name: of the archive, and of the file in it.

    offset: of its header in a zip, otherwise of its content, in a compressed tar after decompression. bytes: that it takes in the
    archive. size: of the file. method: of a zip; None in a tar, STREAMED in a compressed one. crc32: as a zip states it.
    """

    path: Path
    name: str
    offset: int
    bytes: int
    size: int
    method: int | None = None
    crc32: int = 0


class Clip(NamedTuple):
    """The frames of a sequence in order, each a file or its values [H, W, C].

    whole: the name of the clip that it is a window of: those of one clip are in one split. fault: the reason (`PictureFault`) and the
    sentence of a sequence that cannot be used.
    """

    frames: tuple[Place | Packed | bytes | Values, ...]
    whole: str = ""
    fault: tuple[str, str] | None = None


class Item(NamedTuple):
    """One image or sequence to write: a unique key, its file or its values [H, W, C] or its frames, its class (-1: none), and further
    members by ending.
    """

    key: str
    content: Place | Packed | bytes | Values | Clip
    label: int
    members: tuple[tuple[str, bytes], ...] = ()


VECTOR = "vector.npy"
"""The ending of the members that hold the vectors of images, where nothing names another."""


def members_of(vectors: NDArray[np.float32] | None, row: int) -> tuple[tuple[str, bytes], ...]:
    """The member with a row of vectors [N, V]; nothing without vectors and for NaN."""
    if vectors is None or np.isnan(vectors[row]).any():
        return ()
    buffer = io.BytesIO()
    np.save(buffer, vectors[row], allow_pickle=False)
    return ((VECTOR, buffer.getvalue()),)


def open_item(item: Item) -> bytes | Values:
    """Read an image's file, or return its values.

    Raises DataError when the file cannot be read, and PictureFault for one that its archive does not hold soundly.
    """
    assert not isinstance(item.content, Clip)
    return open_content(item.content)


def open_content(content: Place | Packed | bytes | Values) -> bytes | Values:
    """Read a file, or return the values. Raises as `open_item` does."""
    if not isinstance(content, Place | Packed):
        return content
    try:
        with content.path.open("rb") as file:
            if isinstance(content, Packed):
                return read_packed(file, content)
            file.seek(content.offset)
            return file.read(content.bytes)
    except OSError as error:
        raise DataError(f"{content.path} cannot be read: {error.strerror}") from error


def name_of(item: Item) -> str:
    """The name of an item's file for a sentence, or its key."""
    if isinstance(item.content, Packed):
        return printable(f"{item.content.path}/{item.content.name}")
    if isinstance(item.content, Clip):
        return f"sequence {printable(item.key)}"
    return printable(str(item.content.path)) if isinstance(item.content, Place) else f"image {item.key}"


def printable(name: str) -> str:
    """A name for a line of text: line breaks and other control characters, and bytes that are not UTF-8, are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def read_packed(file: IO[bytes], packed: Packed) -> bytes:
    """Read a file from its open archive; that of a compressed tar is what it expands to. Raises PictureFault."""
    if packed.size > MOST_FILE_BYTES:
        raise PictureFault("pixels", f"it expands to {packed.size} bytes; at most {MOST_FILE_BYTES} are read")
    file.seek(packed.offset)
    if packed.method in (STORED, DEFLATED):
        header = file.read(_ZIP_HEADER_BYTES)
        if len(header) < _ZIP_HEADER_BYTES or not header.startswith(b"PK\3\4"):
            raise PictureFault("damaged", "the zip does not have it where its list says")
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
    content = file.read(packed.bytes)
    if packed.method == DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, packed.size + 1)
        except zlib.error as error:
            raise PictureFault("damaged", f"its bytes in the zip do not expand ({error})") from error
    has_crc32 = packed.method in (STORED, DEFLATED)
    if len(content) != packed.size or (has_crc32 and zlib.crc32(content) != packed.crc32):
        raise PictureFault("damaged", "its bytes are not those that its archive states")
    return content
