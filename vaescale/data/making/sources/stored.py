"""Arrays in files, read in blocks of rows: what a file holds may be larger than memory."""

import math
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import DataError

BLOCK_BYTES = 1 << 24
PACKED_BYTES = 1 << 16
MOST_WHOLE_BYTES = 1 << 32  # of an array that its file only gives whole
MOST_RATIO = 1100  # zlib expands a byte to at most 1,032
Array = NDArray[Any]


@dataclass(frozen=True)
class Stored(ABC):
    """An array in a file. name: of the file and the array, for messages."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """The size of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, axis: int = 0) -> Iterator[Array]:
        """Yield consecutive slices along an axis, of about BLOCK_BYTES each. Raises DataError for a damaged file."""
        rows = max(1, BLOCK_BYTES * self.shape[axis] // max(1, self.nbytes))
        with reading(self.name):
            yield from self._slices(axis, rows)

    def whole(self) -> Array:
        """The array in memory. Raises DataError for a damaged file or an array above MOST_WHOLE_BYTES."""
        self._refuse_large()
        blocks = list(self.blocks())
        return np.concatenate(blocks) if blocks else np.empty(self.shape, self.dtype)

    def described(self) -> str:
        """The element type and the shape, as in `float64 [737280, 6]`."""
        return f"{self.dtype} {list(self.shape)}"

    @abstractmethod
    def _slices(self, axis: int, rows: int) -> Iterator[Array]:
        """Yield slices of `rows` along an axis, the last one of fewer."""

    def _refuse_large(self) -> None:
        if self.nbytes > MOST_WHOLE_BYTES:
            raise DataError(
                f"{self.name} takes {self.nbytes} bytes, and its file only gives it whole, up to {MOST_WHOLE_BYTES}; "
                "save it with numpy.save, the images along the first axis"
            )


@dataclass(frozen=True)
class InMemory(Stored):
    """An array that is in memory already."""

    values: Array

    def _slices(self, axis: int, rows: int) -> Iterator[Array]:
        yield from cut(self.values, axis, rows)


@dataclass(frozen=True)
class Raw(Stored):
    """An array whose elements follow each other in a file from `offset` on. fortran: the last axis is the slowest."""

    offset: int
    fortran: bool = False

    @property
    def slowest(self) -> int:
        """The axis whose slices are contiguous in the file."""
        return len(self.shape) - 1 if self.fortran else 0

    def _slices(self, axis: int, rows: int) -> Iterator[Array]:
        if axis == self.slowest:
            yield from self._streamed(rows)
        else:
            yield from cut(self._mapped(), axis, rows)

    def _streamed(self, rows: int) -> Iterator[Array]:
        """Slices along the slowest axis."""
        axis = self.slowest
        number = self.shape[axis]
        row_bytes = self.nbytes // max(1, number)
        with self._open() as read:
            for start in range(0, number, rows):
                shape = [*self.shape]
                shape[axis] = min(rows, number - start)
                content = read(shape[axis] * row_bytes)
                if len(content) != shape[axis] * row_bytes:
                    raise EOFError("it is cut")
                values = np.frombuffer(content, self.dtype)
                yield values.reshape(shape[::-1]).transpose() if self.fortran else values.reshape(shape)
            read(1)  # the end of a compressed part, which has its checksum

    def _mapped(self) -> Array:
        """The whole array, in memory that the system fills from the file."""
        order = cast(Any, "F" if self.fortran else "C")
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)

    @contextmanager
    def _open(self) -> Iterator[Callable[[int], bytes]]:
        """A function that reads the next bytes of the elements."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            yield file.read


@dataclass(frozen=True)
class Packed(Raw):
    """An array in a compressed part of a file: `offset` is behind the beginning of what it expands to."""

    def _mapped(self) -> Array:
        self._refuse_large()
        (whole,) = self._streamed(max(1, self.shape[self.slowest]))
        return whole


@dataclass(frozen=True)
class Zipped(Packed):
    """An array in a member of a zip archive."""

    member: str = ""

    @contextmanager
    def _open(self) -> Iterator[Callable[[int], bytes]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
            member.read(self.offset)
            yield member.read


@dataclass(frozen=True)
class Deflated(Packed):
    """An array in a zlib stream of `length` bytes from `start` on."""

    start: int = 0
    length: int = 0

    @contextmanager
    def _open(self) -> Iterator[Callable[[int], bytes]]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            stream = Inflating(file, self.length)
            stream.read(self.offset)
            yield stream.read


class Inflating:
    """Read what `size` bytes of a file, a zlib stream, expand to, as far as it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size
        self._zlib = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        pieces: list[bytes] = []
        while size and not self._zlib.eof:
            packed = self._zlib.unconsumed_tail
            if not packed:
                packed = self._file.read(min(self._left, PACKED_BYTES))
                self._left -= len(packed)
            piece = self._zlib.decompress(packed, size)
            if not piece and not packed:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def cut(values: Array, axis: int, rows: int) -> Iterator[Array]:
    """Yield slices of `rows` along an axis, in memory of their own."""
    for start in range(0, values.shape[axis], rows):
        index = (slice(None),) * axis + (slice(start, start + rows),)
        yield np.array(values[index])


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Raise DataError for what goes wrong in the block while a file is read. name: what is read."""
    try:
        yield
    except (DataError, ModuleNotFoundError):
        raise
    except PermissionError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; change its permissions") from error
    except MemoryError as error:
        raise DataError(
            f"{name} needs more memory than there is; save it in parts with numpy.save"
        ) from error
    except (
        *(OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, TypeError, KeyError, IndexError),
        *(RuntimeError, NotImplementedError, OverflowError, AttributeError, struct.error),
        *(SyntaxError, tokenize.TokenError),  # numpy reads headers as Python's literals
    ) as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be read ({message}); fetch it again") from error
