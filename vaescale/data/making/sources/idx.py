"""`idx:PATH`: the MNIST family, *images-idx3-ubyte and *labels-idx1-ubyte, gzipped or not."""

import gzip
import struct
import zlib
from functools import cache, partial
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split, report_absent
from vaescale.data.pictures.foreign import known_as
from vaescale.errors import DataError
from vaescale.system.console import say

MOST_IDX_BYTES = 1 << 34


def idx(path: Path, *, kind: str = "idx") -> Source:
    """MNIST, Fashion-MNIST, KMNIST, EMNIST: train and test. LeCun's idx format.

    The values that occur as labels in any split are the classes, in order: EMNIST's letters 1 to 26 become classes 0 to 25, and
    keep their names. EMNIST's images, which its files hold transposed, are turned upright. kind: that of the source, for messages.
    """
    files: dict[str, tuple[Path, Path | None]] = {}
    for name, prefix in (("train", "train"), ("test", "t10k"), ("test", "test")):
        images = _one_file(path, f"{prefix}*images*idx3*")
        if images is not None and name not in files:
            files[name] = images, _one_file(path, f"{prefix}*labels*idx1*")
    if not files:
        below = sorted({str(file.parent) for file in path.rglob("*idx3*")}) if path.is_dir() else []
        remedy = f"did you mean {kind}:{below[0]}?" if below else "give their folder"
        raise DataError(f"{path} holds no idx files such as train-images-idx3-ubyte.gz; {remedy}")

    @cache
    def labels() -> dict[str, NDArray[np.uint8]]:
        return {name: _read_idx(file, dimensions=1) for name, (_, file) in files.items() if file is not None}

    def split(name: str) -> Split:
        found = labels()
        values = np.unique(np.concatenate(list(found.values()))) if found else np.empty(0, np.uint8)
        return _idx_split(name, *files[name], found.get(name), values)

    return Source({name: partial(split, name) for name in files})


def _one_file(path: Path, pattern: str) -> Path | None:
    files = sorted([*path.glob(pattern), *path.glob(f"*-{pattern}")]) if path.is_dir() else []
    stems = {file.name.removesuffix(".gz") for file in files}
    if len(stems) > 1:
        raise DataError(f"{path} holds several data sets ({', '.join(sorted(stems))}); give each its folder")
    return files[0] if files else None


def _idx_split(
    name: str,
    images: Path,
    labels: Path | None,
    given: NDArray[np.uint8] | None,
    values: NDArray[np.uint8],
) -> Split:
    """A split. given: its labels; values: those that are the classes, in order."""
    pixels = _read_idx(images, dimensions=3)[..., None]
    if images.name.startswith("emnist-"):  # stored by columns: Cohen et al. 2017
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3))
        say(f"{name}: EMNIST's files hold their images transposed; they are turned upright")
    classes = np.full(len(pixels), -1) if given is None else np.searchsorted(values, given)
    if len(classes) != len(pixels):
        raise DataError(
            f"{images} holds {len(pixels)} images, {labels} {len(classes)} labels; fetch them again"
        )
    if given is None:
        say(f"{name} has no classes: there are no labels beside {images}")
    else:
        report_absent(name, [*map(str, values)], {*map(str, np.unique(given))})
    items = [
        Item(f"{number:06d}", image, int(label))
        for number, (image, label) in enumerate(zip(pixels, classes, strict=True))
    ]
    return Split(items, len(items), tuple(map(str, values.tolist())))


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes. Its header limits how much is read, and so what a gzip bomb expands to."""
    try:
        with cast(IO[bytes], gzip.open(path) if _is_gzip(path) else path.open("rb")) as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, 8, dimensions)):
                what = f": {known}" if (known := known_as(head)) else ""
                raise DataError(
                    f"{path} is not an idx file of {dimensions} dimensions of bytes{what}; fetch it again"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = int(np.prod(shape, dtype=object))
            if not 0 < size <= MOST_IDX_BYTES:
                raise DataError(f"{path} claims to hold {size} bytes; at most {MOST_IDX_BYTES} are read")
            values = file.read(size)
            rest = file.read(1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(values) != size or rest:
        raise DataError(f"{path} is cut or too long for its header {shape}; fetch it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _is_gzip(path: Path) -> bool:
    """Whether a file is compressed, whatever its ending says: browsers and programs that unpack leave both kinds of names."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
