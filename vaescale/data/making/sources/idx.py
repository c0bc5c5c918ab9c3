"""`idx:PATH`: the MNIST family, *images-idx3-ubyte and *labels-idx1-ubyte, gzipped or not."""

import gzip
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split
from vaescale.errors import DataError

MOST_IDX_BYTES = 1 << 34


def idx(path: Path) -> Source:
    """MNIST, Fashion-MNIST, KMNIST, EMNIST: train and test. LeCun's idx format."""
    splits = {}
    for name, prefix in (("train", "train"), ("test", "t10k"), ("test", "test")):
        images = _one_file(path, f"{prefix}*images*idx3*")
        labels = _one_file(path, f"{prefix}*labels*idx1*")
        if images is not None and name not in splits:
            splits[name] = partial(_idx_split, images, labels)
    if not splits:
        raise DataError(f"{path} holds no idx files such as train-images-idx3-ubyte.gz; give their folder")
    return Source(splits)


def _one_file(path: Path, pattern: str) -> Path | None:
    files = sorted([*path.glob(pattern), *path.glob(f"*-{pattern}")]) if path.is_dir() else []
    stems = {file.name.removesuffix(".gz") for file in files}
    if len(stems) > 1:
        raise DataError(f"{path} holds several data sets ({', '.join(sorted(stems))}); give each its folder")
    return files[0] if files else None


def _idx_split(images: Path, labels: Path | None) -> Split:
    values = _read_idx(images, dimensions=3)[..., None]
    classes = np.full(len(values), -1) if labels is None else _read_idx(labels, dimensions=1)
    if len(classes) != len(values):
        raise DataError(
            f"{images} holds {len(values)} images, {labels} {len(classes)} labels; fetch them again"
        )
    items = [
        Item(f"{number:06d}", image, int(label))
        for number, (image, label) in enumerate(zip(values, classes, strict=True))
    ]
    return Split(items, len(items), tuple(map(str, range(int(classes.max()) + 1))))


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes. Its header limits how much is read, and so what a gzip bomb expands to."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path} is not an idx file of {dimensions} dimensions of bytes")
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
