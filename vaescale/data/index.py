"""The index of WebDataset tars: the samples of each shard, and the position of each image.

    DIR/NAME.tar          plain WebDataset: members KEY.jpg (or png, webp, npy) and KEY.cls
    DIR/NAME.index.npy    an entry per sample: its image's position, crc32, class and key, and the frames of a sequence
    DIR/index.json        a row per shard: bytes, sha256, samples, bytes and sha256 of its .index.npy, name; the
                          images' shape, the type and range of their values where that is not uint8, the classes' names, how it was made; the folder of the tars where it is another one

The index is written last, so a folder without one is unfinished. All functions are pure: bytes in, checked values out. An
index may come from anywhere, so nothing in it is trusted. Whenever an image is read, its bytes are checked against the
entry's crc32, so that image, class and key always belong together.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaescale.config import WHOLE, Dtype
from vaescale.errors import DataError

INDEX = "index.json"
LATENTS = "latents"  # `made.kind` of an index of latents, not images
CODES = "codes"  # that of an index of codes
SEQUENCES = "sequences"  # that of an index of sequences of frames
FORMAT = {"format": "vaescale-shards", "version": 2}
Entries = NDArray[np.void]
_FRAMES = b"('frames', '<i4')"
_KEY_BYTES = re.compile(rb"\('key', '\|S(\d{1,4})'\)")


class Shard(NamedTuple):
    """One tar: its file name, size, sha256 and number of samples; size and sha256 of the .index.npy beside it."""

    name: str
    bytes: int
    sha256: str
    samples: int
    entries_bytes: int
    entries_sha256: str

    @property
    def entries_name(self) -> str:
        """The file name of its entries."""
        return self.name.removesuffix(".tar") + ".index.npy"


class ShardTable(Sequence[Shard]):
    """A table of many shards in little memory: a row of text each, parsed on access."""

    def __init__(self, rows: Iterable[str]) -> None:
        self.rows = list(rows)
        self.samples = np.array([int(row.split(" ", 3)[2]) for row in self.rows], dtype=np.int64)

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """Build the table of these shards."""
        return cls(" ".join(map(str, (*shard[1:], shard.name))) for shard in shards)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> "list[Shard]": ...
    def __getitem__(self, number: int | slice) -> "Shard | list[Shard]":
        if isinstance(number, slice):
            return [_parse_row(row) for row in self.rows[number]]
        return _parse_row(self.rows[number])


class Values(NamedTuple):
    """The type of the stored values, and the least and the greatest of them; of uint8 those of the type."""

    dtype: Dtype = "uint8"
    low: float = 0
    high: float = 255

    def text(self) -> str:
        """The values in words, such as int16 from -1024 to 3071."""
        return "uint8" if self.dtype == "uint8" else f"{self.dtype} from {self.low:g} to {self.high:g}"


class ShardIndex(NamedTuple):
    """The content of index.json of the data set at `place`, a folder or a URL.

    image: height, width, channels when all images agree, otherwise None. made: how the shards were made. tars: the absolute
    path of the folder that holds the tars, empty where they are at `place`.
    """

    place: str
    shards: ShardTable
    image: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    made: dict[str, Any]
    tars: str = ""
    values: Values = Values()

    @property
    def num_samples(self) -> int:
        """The number of samples in all shards."""
        return int(self.shards.samples.sum())

    @property
    def num_bytes(self) -> int:
        """The total size of all tars in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def data_hash(self) -> str:
        """A sha256 that identifies the content: over the shards' and their entries' sha256, in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.sha256}{shard.entries_sha256}".encode())
        return digest.hexdigest()


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _ImageShape(_Checked):
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    channels: int = Field(gt=0, le=16)


class _StoredValues(_Checked):
    dtype: Dtype
    low: float
    high: float


_NUMBER, _SHA256 = "[1-9][0-9]{0,15}", "[0-9a-f]{64}"
_Row = Annotated[str, Field(pattern=rf"^{_NUMBER} {_SHA256} {_NUMBER} {_NUMBER} {_SHA256} .+\.tar$")]


class _IndexFile(_Checked):
    format: Literal["vaescale-shards"]
    version: Literal[2]
    image: _ImageShape | None
    values: _StoredValues | None = None
    class_names: tuple[str, ...]
    made: dict[str, Any]
    tars: str | None = None
    shards: list[_Row] = Field(min_length=1)


def parse_index(content: bytes, place: str) -> ShardIndex:
    """Parse the index of the data set at `place`. Raises DataError when its format is unknown or a name is unsafe."""
    try:
        parsed = _IndexFile.model_validate_json(content, strict=True)
    except ValueError as error:
        raise DataError(
            f"{place}/{INDEX} is not a shard index of this version ({_first_line(error)}); write the shards again, or "
            f"`vaescale make-shards --index-only {place}` for tars made by others"
        ) from error
    names = [row.split(" ", 5)[5] for row in parsed.shards]
    for name in names:
        if "/" in name or "\\" in name or not name.isprintable():
            raise DataError(f"{place}/{INDEX} names shard {name!r}, which is not a plain .tar name")
    if len(set(names)) != len(names):
        raise DataError(f"{place}/{INDEX} names a shard twice; write the index again")
    tars = parsed.tars or ""
    if tars and (not tars.startswith("/") or ".." in tars.split("/") or not tars.isprintable()):
        raise DataError(
            f"{place}/{INDEX} names tars in {tars!r}, which is not the absolute path of a folder; index them again"
        )
    shape = parsed.image
    image = None if shape is None else (shape.height, shape.width, int(shape.channels))
    return ShardIndex(
        place,
        ShardTable(parsed.shards),
        image,
        parsed.class_names,
        parsed.made,
        tars,
        _values(parsed.values, place),
    )


def _values(stated: _StoredValues | None, place: str) -> Values:
    if stated is None:
        return Values()
    whole = WHOLE[stated.dtype]
    if stated.low > stated.high or (whole and not whole[0] <= stated.low <= stated.high <= whole[1]):
        raise DataError(
            f"{place}/{INDEX} states {stated.dtype} values from {stated.low:g} to {stated.high:g}; write the index again"
        )
    return Values(stated.dtype, stated.low, stated.high)


def _parse_row(row: str) -> Shard:
    size, sha256, samples, entries_bytes, entries_sha256, name = row.split(" ", 5)
    return Shard(name, int(size), sha256, int(samples), int(entries_bytes), entries_sha256)


def index_content(index: ShardIndex) -> bytes:
    """The bytes of index.json: readable, one line per shard."""
    head = {
        **FORMAT,
        "image": index.image and dict(zip(("height", "width", "channels"), index.image, strict=True)),
        **({} if index.values == Values() else {"values": index.values._asdict()}),
        "class_names": index.class_names,
        "made": index.made,
        **({"tars": index.tars} if index.tars else {}),
    }
    lines = ",\n".join(map(json.dumps, index.shards.rows))
    return f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n'.encode()


def make_entries(rows: list[tuple[int, int, int, int, str]], frames: Sequence[int] | None = None) -> Entries:
    """Build entries from rows of (offset, bytes, crc32, class or -1, key). frames: of each sample, of sequences."""
    keys = [row[4].encode() for row in rows]
    kind = _entry_type(max(map(len, keys), default=1), of_sequences=frames is not None)
    lengths = [()] * len(rows) if frames is None else [(number,) for number in frames]
    table = zip(rows, keys, lengths, strict=True)
    return np.array([(*row[:4], key, *length) for row, key, length in table], dtype=kind)


def entries_content(entries: Entries) -> bytes:
    """The bytes of a .index.npy."""
    buffer = io.BytesIO()
    np.save(buffer, entries, allow_pickle=False)
    return buffer.getvalue()


def parse_entries(content: bytes, shard: Shard, place: str) -> Entries:
    """Parse the entries of one shard. Raises DataError when they do not match the index or the shard."""
    name = f"{place}/{shard.entries_name}"
    if hashlib.sha256(content).hexdigest() != shard.entries_sha256:
        raise DataError(
            f"{name} is not the one that {INDEX} was written with; copy both again or write the shards again"
        )
    # Not np.load: it evaluates the header, which CPython 3.11 cannot do in several threads, and accepts other types.
    match = _KEY_BYTES.search(content[:300])
    kind = _entry_type(int(match[1]) if match else 1, of_sequences=_FRAMES in content[:300])
    start = _header(kind, shard.samples)
    if (
        match is None
        or len(content) != len(start) + kind.itemsize * shard.samples
        or content[: len(start)] != start
    ):
        raise DataError(f"{name} does not hold {shard.samples} entries; write the shards again")
    entries: Entries = np.frombuffer(content, kind, offset=len(start))
    least = min(entries["offset"].min(), entries["bytes"].min())
    if "frames" in (kind.names or ()):
        least = min(least, entries["frames"].min() - 1)
    if least < 0 or (entries["bytes"] > shard.bytes - entries["offset"]).any():
        raise DataError(f"{name} points outside of {shard.name}; write the shards again")
    return entries


def describe(index: ShardIndex) -> dict[str, Any]:
    """A summary of the index, for tables and JSON."""
    image = "x".join(map(str, index.image)) if index.image else "of several shapes"
    return {
        "folder": index.place,
        "shards": len(index.shards),
        "samples": index.num_samples,
        "bytes": index.num_bytes,
        "image": image,
        **({} if index.values == Values() else {"values": index.values._asdict()}),
        "classes": len(index.class_names),
        "data_hash": index.data_hash,
        "made": index.made,
        **({"tars": index.tars} if index.tars else {}),
    }


def _header(kind: np.dtype[np.void], count: int) -> bytes:
    """What np.save writes before `count` entries."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _entry_type(key_bytes: int, *, of_sequences: bool) -> np.dtype[np.void]:
    fields = [("offset", "<i8"), ("bytes", "<i8"), ("crc32", "<u4"), ("label", "<i4")]
    return np.dtype([*fields, ("key", f"S{max(1, key_bytes)}"), *([("frames", "<i4")] * of_sequences)])


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        if not fault["loc"]:
            return fault["msg"]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return (str(error) or type(error).__name__).splitlines()[0]
