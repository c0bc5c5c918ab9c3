"""WebDataset tars with an index beside them: written atomically, read by (shard, offset).

    DIR/shard-000000.tar          members KEY.png and KEY.cls, as plain webdataset reads them
    DIR/shard-000000.index.npy    int64 [samples, 3]: offset and bytes of the image's file, class (-1: none)
    DIR/index.json                per shard its name, bytes, sha256 and samples; the images' shape; classes

The index is written last, so a folder without one is an unfinished folder.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError

from vaescale.config import Config
from vaescale.errors import DataError
from vaescale.files import write_whole

INDEX = "index.json"
FORMAT = {"format": "vaescale-shards", "version": 1}


class _ShardEntry(Config):
    name: str
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    samples: int = Field(gt=0)


class _ImageShape(Config):
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    channels: int = Field(gt=0)


class _IndexFile(Config):
    """What index.json must hold. It may come from anywhere, so nothing of it is trusted."""

    format: Literal["vaescale-shards"]
    version: Literal[1]
    shards: list[_ShardEntry] = Field(min_length=1)
    image: _ImageShape
    classes: int = Field(ge=0)


class Sample(NamedTuple):
    """One image to write: a unique key, uint8 [H, W, C], and its class."""

    key: str
    image: NDArray[np.uint8]
    label: int


class Shard(NamedTuple):
    """One tar: its file name within the folder, its size, its sha256 and its number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


class ShardIndex(NamedTuple):
    """What index.json says. image: height, width, channels."""

    folder: Path
    shards: tuple[Shard, ...]
    image: tuple[int, int, int]
    classes: int

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def data_hash(self) -> str:
        """Identifies the content: a sha256 over the shards' sha256, in order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def write_shards(samples: Iterable[Sample], folder: Path, *, samples_per_shard: int = 1000) -> ShardIndex:
    """Write samples as PNG shards with their index; the same samples give the same bytes.

    All images must have one shape. Raises DataError for an image of another shape, or when there is none.
    """
    shards: list[Shard] = []
    shape: tuple[int, ...] | None = None
    classes = 0
    source = iter(samples)
    while batch := list(islice(source, samples_per_shard)):
        for sample in batch:
            shape = shape or sample.image.shape
            if sample.image.shape != shape:
                raise DataError(
                    f"{sample.key} is {sample.image.shape}, the images before it {shape}; resize them"
                )
            classes = max(classes, sample.label + 1)
        shards.append(_write_shard(batch, folder / f"shard-{len(shards):06d}.tar"))
    if shape is None:
        raise DataError(f"no samples to write to {folder}; check the source")
    index = ShardIndex(folder, tuple(shards), (shape[0], shape[1], shape[2]), classes)
    content = {
        **FORMAT,
        "shards": [shard._asdict() for shard in shards],
        "image": dict(zip(("height", "width", "channels"), index.image, strict=True)),
        "classes": classes,
    }
    write_whole(folder / INDEX, json.dumps(content, indent=1).encode())
    return index


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards. Raises DataError when it is missing, foreign or unsafe."""
    path = folder / INDEX
    if not folder.exists():
        raise DataError(
            f"data folder {folder} does not exist in {Path.cwd()}; `vaescale make-shards SOURCE OUT` writes OUT/train "
            f"and OUT/val"
        )
    if not folder.is_dir():
        raise DataError(f"data folder {folder} is a file; name the folder that holds its {INDEX}")
    if not path.is_file():
        if inner := sorted(str(other.parent) for other in folder.glob(f"*/{INDEX}")):
            raise DataError(f"{folder} holds no shards itself; did you mean {' or '.join(inner)}?")
        raise DataError(
            f"{folder} has no {INDEX}; write the shards with `vaescale make-shards SOURCE OUT` (tars made by others "
            f"cannot be read yet)"
        )
    try:
        content = _IndexFile.model_validate_json(path.read_bytes(), strict=True)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} is not a shard index ({_first_line(error)}); write the shards again"
        ) from error
    image = (content.image.height, content.image.width, content.image.channels)
    index = ShardIndex(
        folder, tuple(Shard(**shard.model_dump()) for shard in content.shards), image, content.classes
    )
    for shard in index.shards:
        _check_shard(folder, shard)
    return index


def read_offsets(folder: Path, shard: Shard) -> NDArray[np.int64]:
    """Int64 [samples, 3] of one shard: image offset, image bytes, class. Raises DataError when it does not fit."""
    path = folder / _offsets_name(shard.name)
    try:
        offsets: NDArray[np.int64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); write the shards again") from error
    if offsets.dtype != np.int64 or offsets.shape != (shard.samples, 3):
        raise DataError(f"{path} holds {offsets.dtype} {offsets.shape}, not int64 ({shard.samples}, 3)")
    if shard.samples and (offsets[:, :2].min() < 0 or (offsets[:, 0] + offsets[:, 1]).max() > shard.bytes):
        raise DataError(f"{path} points outside of {shard.name}; write the shards again")
    return offsets


def _check_shard(folder: Path, shard: Shard) -> None:
    path = folder / shard.name
    if shard.name != os.path.basename(shard.name) or not shard.name.endswith(".tar"):
        raise DataError(
            f"{folder / INDEX} names shard {shard.name!r}, which is not a plain .tar name in {folder}"
        )
    if not path.is_file():
        raise DataError(f"shard {path} is missing; write the shards again or copy it back")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            f"shard {path} has {path.stat().st_size} bytes, its index says {shard.bytes}; copy it again"
        )


def _write_shard(samples: list[Sample], path: Path) -> Shard:
    from webdataset import TarWriter

    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, "cls": str(sample.label).encode(), "png": _png(sample.image)})
    content = buffer.getvalue()
    offsets = np.array(list(_members(content)), dtype=np.int64).reshape(-1, 3)
    array = io.BytesIO()
    np.save(array, offsets, allow_pickle=False)
    write_whole(path, content)
    write_whole(path.with_name(_offsets_name(path.name)), array.getvalue())
    return Shard(path.name, len(content), hashlib.sha256(content).hexdigest(), len(samples))


def _members(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Image offset, image bytes and class of each sample of a tar that this module wrote."""
    label: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            if extension == "cls":
                label[key] = int(content[member.offset_data : member.offset_data + member.size])
            else:
                yield member.offset_data, member.size, label[key]


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _offsets_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + ".index.npy"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return str(error).splitlines()[0]


def describe(index: ShardIndex) -> dict[str, Any]:
    """The index in a few words, for tables and JSON."""
    height, width, channels = index.image
    return {
        "folder": str(index.folder),
        "shards": len(index.shards),
        "samples": index.num_samples,
        "bytes": sum(shard.bytes for shard in index.shards),
        "image": f"{height}x{width}x{channels}",
        "classes": index.classes,
        "data_hash": index.data_hash,
    }
