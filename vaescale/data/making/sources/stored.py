"""Arrays in files, read in blocks of rows: what a file holds may be larger than memory."""

import math
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import DataError

BLOCK_BYTES = 1 << 24
MOST_WHOLE_BYTES = 1 << 32  # of an array that its file only gives whole
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
    """An array whose elements follow each other in a file, or in a member of a zip archive, from `offset` on."""

    offset: int
    fortran: bool = False
    member: str | None = None

    def _slices(self, axis: int, rows: int) -> Iterator[Array]:
        slowest = len(self.shape) - 1 if self.fortran else 0
        if axis == slowest:
            yield from self._streamed(axis, rows)
        elif self.member is None:
            order = "F" if self.fortran else "C"
            mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, cast(Any, order))
            yield from cut(mapped, axis, rows)
        else:
            self._refuse_large()
            yield from cut(np.concatenate([*self._streamed(slowest, rows)], axis=slowest), axis, rows)

    def _streamed(self, axis: int, rows: int) -> Iterator[Array]:
        """Slices along the axis whose slices are contiguous in the file."""
        number = self.shape[axis]
        row_bytes = self.nbytes // max(1, number)
        with self._open() as file:
            for start in range(0, number, rows):
                shape = [*self.shape]
                shape[axis] = min(rows, number - start)
                content = file.read(shape[axis] * row_bytes)
                if len(content) != shape[axis] * row_bytes:
                    raise EOFError("it is cut")
                values = np.frombuffer(content, self.dtype)
                yield values.reshape(shape[::-1]).transpose() if self.fortran else values.reshape(shape)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.member is None:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
            member.read(self.offset)
            yield member


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
    except MemoryError as error:
        raise DataError(
            f"{name} needs more memory than there is; save it in parts with numpy.save"
        ) from error
    except (
        *(OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, TypeError, KeyError, IndexError),
        *(RuntimeError, NotImplementedError, OverflowError, AttributeError),
        *(SyntaxError, tokenize.TokenError),  # numpy reads headers as Python's literals
    ) as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be read ({message}); fetch it again") from error
