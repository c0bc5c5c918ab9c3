"""The arrays of .npy, .npz, .mat and .h5 files: names, shapes and element types from headers, elements on demand.

Nothing is unpickled: arrays of Python objects are left out, with a reason.
"""

import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vaescale.data.making.sources.archives import is_archive
from vaescale.data.making.sources.matlab import is_matlab, read_matlab
from vaescale.data.making.sources.stored import MOST_RATIO, Array, Raw, Stored, Zipped, reading
from vaescale.data.pictures.foreign import known_as
from vaescale.errors import DataError

MOST_CHUNK_BYTES = 1 << 28
SUFFIXES = (".npy", ".npz", ".mat", ".h5", ".hdf5")
_HDF5, _HDF5_BLOCKS = b"\x89HDF\r\n\x1a\n", (0, 512, 1024, 2048)
_NPY, _ZIP = b"\x93NUMPY", b"PK"


class Contents(NamedTuple):
    """The arrays of a file by key, and why others are left out, by key. A .npy file's array has the file's stem as its key."""

    arrays: dict[str, Stored]
    left_out: dict[str, str]


def open_arrays(path: Path) -> Contents:
    """Read the headers of a file's arrays. Raises DataError for a file that cannot be read.

    The first bytes decide the format, and the ending of the name only whether HDF5 has MATLAB's order of axes.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        unpack = "unpack it, and give its files" if is_archive(path) else "give one"
        raise DataError(f"{path} is no {', '.join(SUFFIXES)} file; {unpack}, or a folder of them")
    with reading(path):
        with path.open("rb") as file:
            head = file.read(_HDF5_BLOCKS[-1] + len(_HDF5))
        if head.startswith(_NPY):
            return _npy(path)
        if head.startswith(_ZIP):
            return _npz(path)
        if any(head.startswith(_HDF5, offset) for offset in _HDF5_BLOCKS):
            return _h5(path, matlab=suffix == ".mat")
        if is_matlab(head):
            return Contents(*read_matlab(path))
    what = (
        known_as(head)
        or f"it begins with {head[:8].hex()}, unlike files of arrays (MATLAB's from version 5 on)"
    )
    raise DataError(f"{path} holds no arrays: {what}; fetch it again")


def _npy(path: Path) -> Contents:
    with path.open("rb") as file:
        header = _header(file)
        offset = file.tell()
    if header.left_out:
        return Contents({}, {path.stem: header.left_out})
    array = Raw(path, str(path), header.shape, header.dtype, offset, header.fortran)
    _refuse_other_size(array, path.stat().st_size - offset)
    return Contents({path.stem: array}, {})


def _npz(path: Path) -> Contents:
    contents = Contents({}, {})
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            name = f"{path} ({key})"
            if key == member.filename:
                contents.left_out[key] = "no array"
                continue
            if member.file_size > MOST_RATIO * (member.compress_size + 1):
                raise DataError(
                    f"{name} claims that {member.compress_size} bytes expand to {member.file_size}; fetch it again"
                )
            with reading(name), archive.open(member) as file:
                header = _header(file)
                offset = file.tell()
            if header.left_out:
                contents.left_out[key] = header.left_out
                continue
            array = Zipped(path, name, header.shape, header.dtype, offset, header.fortran, member.filename)
            _refuse_other_size(array, member.file_size - offset)
            contents.arrays[key] = array
    return contents


class _Header(NamedTuple):
    """Shape, order and element type of a .npy file; left_out: why its elements are not read, or empty."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    left_out: str


def _header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return _Header((), False, np.dtype("u1"), f"format {version}, which is for arrays of records")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a header that Python 2 wrote: (10L, 28L, 28L)
        shape, fortran, dtype = read(file)
    if any(length < 0 for length in shape):
        raise ValueError(f"its header names the shape {list(shape)}")
    return _Header(
        shape, fortran, dtype, "Python objects, which are not unpickled" if dtype.hasobject else ""
    )


def _refuse_other_size(array: Stored, size: int) -> None:
    if array.nbytes != size:
        raise DataError(
            f"{array.name} holds {size} bytes, its header names {array.described()}, {array.nbytes} bytes; fetch it again"
        )


@dataclass(frozen=True)
class _Hdf5(Stored):
    """A data set of an HDF5 file. matlab: its axes are stored in the reverse order of `shape`."""

    key: str
    matlab: bool

    def _slices(self, axis: int, rows: int) -> Iterator[Array]:
        import h5py

        stored_axis = len(self.shape) - 1 - axis if self.matlab else axis
        with h5py.File(self.path, "r", locking=False) as file:
            data = file[self.key]
            rows = _whole_chunks(data, stored_axis, rows)
            for start in range(0, self.shape[axis], rows):
                block = data[(slice(None),) * stored_axis + (slice(start, start + rows),)]
                yield block.transpose() if self.matlab else block


def _whole_chunks(data: Any, axis: int, rows: int) -> int:
    """About so many rows that no chunk of a data set is expanded for two blocks, where memory allows it."""
    if data.chunks is None:
        return rows
    chunk = data.chunks[axis]
    row_bytes = math.prod(data.shape) // max(1, data.shape[axis]) * data.dtype.itemsize
    return max(chunk, rows // chunk * chunk) if chunk * row_bytes <= MOST_CHUNK_BYTES else rows


def _h5(path: Path, *, matlab: bool) -> Contents:
    import h5py

    contents = Contents({}, {})

    def visit(key: str, data: Any) -> None:
        if not isinstance(data, h5py.Dataset) or (matlab and key.startswith("#")):
            return
        name = f"{path} ({key})"
        shape = tuple(data.shape or ())
        dtype = data.dtype
        if data.is_virtual or data.external:
            contents.left_out[key] = "elements in other files"
        elif dtype.hasobject or dtype.names:
            contents.left_out[key] = "strings, references or records"
        elif data.shape is None:
            contents.left_out[key] = "empty"
        else:
            claimed, there = math.prod(shape) * dtype.itemsize, data.id.get_storage_size()
            if claimed > MOST_RATIO * (there + 1):
                raise DataError(f"{name} claims {claimed} bytes, of which {there} are stored; fetch it again")
            shape = shape[::-1] if matlab else shape
            contents.arrays[key] = _Hdf5(path, name, shape, dtype, key, matlab)

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(visit)
    return contents
