"""The numeric arrays of MATLAB's .mat files, versions 5 to 7.2. The MathWorks, "MAT-File Format", 2025.

SciPy reads such files too, but whole, and a damaged one can end the process. Version 7.3 is HDF5.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vaescale.data.making.sources.stored import MOST_RATIO, Deflated, Inflating, Raw, Stored

HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15  # types of elements
MOST_NAME_BYTES = 1000
MOST_AXES = 32
COMPLEX = 0x08
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 16: "function", 17: "object"}
_NUMERIC = range(6, 16)
_ORDERS = {b"IM": "<", b"MI": ">"}


def is_matlab(head: bytes) -> bool:
    """Whether a file begins like one of versions 5 to 7.2."""
    return head[126:HEADER_BYTES] in _ORDERS


def read_matlab(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The numeric arrays by name, and why other variables are left out, by name. Only headers are read.

    The element type is that of the file, which is often smaller than the variable's. Raises ValueError and EOFError.
    """
    arrays: dict[str, Stored] = {}
    left_out: dict[str, str] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        order = _ORDERS[file.read(HEADER_BYTES)[126:]]
        position = HEADER_BYTES
        while position < size:
            file.seek(position)
            kind, length = struct.unpack(f"{order}II", _exactly(file.read, 8))
            start = position + 8
            if start + length > size:
                raise EOFError("it is cut")
            position = start + length
            if kind in (MATRIX, COMPRESSED):
                variable = _variable(file, length, order, packed=kind == COMPRESSED)
                if variable.left_out:
                    left_out[variable.name] = variable.left_out
                else:
                    arrays[variable.name] = _stored(path, variable, start, length, packed=kind == COMPRESSED)
            if kind != COMPRESSED:
                position += -length % 8
    return arrays, left_out


class _Variable(NamedTuple):
    """A variable. offset: of its elements behind the beginning of the element of the file. left_out: why, or empty."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    offset: int = 0
    bytes: int = 0
    left_out: str = ""


class _Counting:
    """Read exactly so many bytes, and count them."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self.position = read, 0

    def read(self, size: int) -> bytes:
        self.position += size
        return _exactly(self._read, size)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    content = read(size)
    if len(content) != size:
        raise EOFError("it is cut")
    return content


def _variable(file: IO[bytes], length: int, order: str, *, packed: bool) -> _Variable:
    """The header of the variable that begins here."""
    stream = _Counting(Inflating(file, length).read if packed else file.read)
    if packed and struct.unpack(f"{order}II", stream.read(8))[0] != MATRIX:
        raise ValueError("a compressed element is no variable")
    flags = struct.unpack(f"{order}I", _small(stream, order, most=8)[:4])[0]
    dimensions = _small(stream, order, most=4 * MOST_AXES)
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    name = _small(stream, order, most=MOST_NAME_BYTES).decode("latin-1")
    kind = flags & 0xFF
    if kind not in _NUMERIC or flags >> 8 & COMPLEX:
        return _Variable(name, left_out=f"a MATLAB {_CLASSES.get(kind, 'array of complex numbers')}")
    if any(axis < 0 for axis in shape):
        raise ValueError(f"{name} has the shape {list(shape)}")
    data_type, data_bytes, _ = _tag(stream, order)
    if data_type not in _TYPES:
        raise ValueError(f"{name} has elements of type {data_type}")
    return _Variable(name, shape, order + _TYPES[data_type], stream.position, data_bytes)


def _tag(stream: _Counting, order: str) -> tuple[int, int, bool]:
    """The type of an element, the bytes that it has, and whether these are in its tag."""
    (first,) = struct.unpack(f"{order}I", stream.read(4))
    if first >> 16:
        return first & 0xFFFF, first >> 16, True
    return first, struct.unpack(f"{order}I", stream.read(4))[0], False


def _small(stream: _Counting, order: str, *, most: int) -> bytes:
    """The content of an element of a header."""
    _, length, inside = _tag(stream, order)
    if length > (4 if inside else most):
        raise ValueError(f"a header claims {length} bytes")
    return stream.read(4 if inside else length + -length % 8)[:length]


def _stored(path: Path, variable: _Variable, start: int, length: int, *, packed: bool) -> Stored:
    """The array of a variable whose element is `length` bytes from `start` on."""
    name, dtype = f"{path} ({variable.name})", np.dtype(variable.dtype)
    claimed = math.prod(variable.shape) * dtype.itemsize
    if claimed != variable.bytes:
        raise ValueError(f"{variable.name} is {dtype} {list(variable.shape)}, with {variable.bytes} bytes")
    most = MOST_RATIO * (length + 1) if packed else length
    if variable.offset + claimed > most:
        raise ValueError(f"{variable.name} claims {claimed} bytes, which {length} bytes cannot hold")
    if packed:
        return Deflated(path, name, variable.shape, dtype, variable.offset, True, start, length)
    return Raw(path, name, variable.shape, dtype, start + variable.offset, True)
