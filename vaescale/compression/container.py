"""The file format .vsz: a header, chunks, and a table of the chunks. docs/compression.md describes it byte by byte.

A file may come from anybody: every length is checked against the file's and against a bound before anything is read or unpacked, and
nothing in it is a path, code or a pickle.
"""

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.compression.bits_back import Grids
from vaescale.compression.chunks import Coding, describe
from vaescale.compression.rounding import PHASES, Phases
from vaescale.errors import DataError
from vaescale.system.files import strict_json

MAGIC, CHUNK_MAGIC, TABLE_MAGIC = b"VAESZ\x00\x00", b"VSZC", b"VSZT"
VERSION, MIXTURE_VERSION = 1, 2  # of a file whose prior is a mixture: earlier readers know N(0, I) alone
VERSIONS = (VERSION, MIXTURE_VERSION)
LENGTHS = struct.Struct("<4sIIII")  # of a chunk: magic, and the bytes of its four parts
HEADER_LENGTH, CRC = struct.Struct("<I"), struct.Struct("<I")
TRAILER = struct.Struct("<QII4s")  # offset, bytes and crc32 of the table, and its magic
MOST_HEADER_BYTES = 1 << 20
MOST_UNPACKED_BYTES = 1 << 26  # of a part of a chunk
MOST_CHUNK_VALUES = 1 << 26
MOST_CHUNK_BYTES = 1 << 28
MOST_TABLE_BYTES = 1 << 28


class Names(NamedTuple):
    """What is kept of a chunk's images besides pixels: the source's split, keys, labels (-1: none) and numbers in the source, and the
    vectors [B, V] that are the condition of a run that has such."""

    split: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    slots: tuple[int, ...]
    vectors: NDArray[np.float32] | None = None


class Chunk(NamedTuple):
    """A chunk of a file."""

    coding: Coding
    names: Names


class Record(NamedTuple):
    """Where a chunk is in a file: offset, bytes, and number of images."""

    offset: int
    bytes: int
    images: int


def pack_header(header: dict[str, Any]) -> bytes:
    """The bytes of a header. Its "mixture", if it has one, makes the version 2."""
    version = MIXTURE_VERSION if "mixture" in header else VERSION
    packed = zlib.compress(strict_json({**header, "version": version}).encode(), 9)
    assert len(packed) <= MOST_HEADER_BYTES
    content = MAGIC + bytes([version]) + HEADER_LENGTH.pack(len(packed)) + packed
    return content + CRC.pack(zlib.crc32(content))


def pack_chunk(chunk: Chunk) -> bytes:
    """The bytes of a chunk."""
    coding = chunk.coding
    parts = [
        zlib.compress(strict_json(describe(coding)).encode(), 9),
        zlib.compress(strict_json(_pack_names(chunk.names)).encode(), 9),
        np.array(coding.checks, "<u4").tobytes(),
        coding.words.astype("<u4").tobytes(),
    ]
    content = b"".join([LENGTHS.pack(CHUNK_MAGIC, *map(len, parts)), *parts])
    return content + CRC.pack(zlib.crc32(content))


def pack_table(records: list[Record], offset: int) -> bytes:
    """The bytes of the table, which begins at `offset`."""
    table = zlib.compress(strict_json([list(record) for record in records]).encode(), 9)
    return table + TRAILER.pack(offset, len(table), zlib.crc32(table), TABLE_MAGIC)


def part_bytes(content: bytes) -> dict[str, int]:
    """The bytes of a packed chunk by what they are for: names (keys and labels), checks, code, and frame, the rest."""
    _, _, names, checks, words = LENGTHS.unpack_from(content)
    return {"names": names, "checks": checks, "code": words, "frame": len(content) - names - checks - words}


class Reader:
    """An open file. Raises DataError for a file of another kind or version, or with a damaged header.

    header: of the file. records: of its chunks; where the table is damaged or cut off, of those that a walk through the file meets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from None
        self._bytes = path.stat().st_size
        self.is_whole, self.records = True, list[Record]()
        try:
            self.header = self._read_header()
        except DataError:
            self._file.close()
            raise
        try:
            self.records = self._read_table()
        except DataError:
            self.is_whole, self.records = False, list(self._walk())

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def chunk(self, number: int, image_shape: tuple[int, int, int], *, groups: int = 1) -> Chunk:
        """Read a chunk. groups: G, the number of groups of latents. Raises DataError where it is damaged."""
        record = self.records[number]
        if record.bytes > MOST_CHUNK_BYTES:
            raise DataError(f"it has {record.bytes} bytes; at most {MOST_CHUNK_BYTES} are read")
        content = self._at(record.offset, record.bytes)
        if len(content) < LENGTHS.size + CRC.size or CRC.unpack(content[-CRC.size :])[0] != zlib.crc32(
            content[: -CRC.size]
        ):
            raise DataError("its checksum differs")
        magic, *lengths = LENGTHS.unpack_from(content)
        if magic != CHUNK_MAGIC or LENGTHS.size + sum(lengths) + CRC.size != len(content):
            raise DataError("its parts do not fill it")
        parts, start = [], LENGTHS.size
        for length in lengths:
            parts.append(content[start : start + length])
            start += length
        try:
            return _unpack(*parts, values=int(np.prod(image_shape)), groups=groups)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"its content is invalid ({type(error).__name__})") from None

    def _read_header(self) -> dict[str, Any]:
        size = len(MAGIC) + 1 + HEADER_LENGTH.size
        start = self._at(0, size)
        if start[: len(MAGIC)] != MAGIC or len(start) < size:
            raise DataError(f"{self.path} is no .vsz file")
        (length,), version = HEADER_LENGTH.unpack_from(start, len(MAGIC) + 1), start[len(MAGIC)]
        if version not in VERSIONS:
            raise DataError(
                f"{self.path} has version {version} of the format, and this reads {' and '.join(map(str, VERSIONS))}"
            )
        if length > MOST_HEADER_BYTES:
            raise DataError(
                f"{self.path} has a header of {length} bytes; at most {MOST_HEADER_BYTES} are read"
            )
        content = self._at(0, len(start) + length + CRC.size)
        if len(content) < len(start) + length + CRC.size or CRC.unpack(content[-CRC.size :])[0] != zlib.crc32(
            content[: -CRC.size]
        ):
            raise DataError(f"the header of {self.path} is damaged")
        self._after_header = len(content)
        try:
            header = json.loads(_inflate(content[len(start) : -CRC.size]))
        except (ValueError, RecursionError):
            raise DataError(f"the header of {self.path} is no JSON") from None
        if not isinstance(header, dict) or header.get("version") != version:
            raise DataError(f"the header of {self.path} is not of version {version}")
        if ("mixture" in header) != (version == MIXTURE_VERSION):
            raise DataError(
                f"the header of {self.path} is invalid: version {version} and its prior contradict each other"
            )
        return header

    def _read_table(self) -> list[Record]:
        trailer = self._at(max(0, self._bytes - TRAILER.size), TRAILER.size)
        if len(trailer) < TRAILER.size:
            raise DataError("no table")
        offset, length, check, magic = TRAILER.unpack(trailer)
        if magic != TABLE_MAGIC or length > MOST_TABLE_BYTES or offset + length + TRAILER.size != self._bytes:
            raise DataError("no table")
        content = self._at(offset, length)
        if zlib.crc32(content) != check:
            raise DataError("damaged table")
        try:
            records = [Record(*map(_natural, entry)) for entry in json.loads(_inflate(content))]
        except (TypeError, ValueError, RecursionError):
            raise DataError("damaged table") from None
        position = self._after_header
        for record in records:
            if record.offset != position:
                raise DataError("damaged table")
            position += record.bytes
        if position != offset:
            raise DataError("damaged table")
        return records

    def _walk(self) -> Iterator[Record]:
        """The chunks in the order of the file, up to where one does not begin with its magic or ends after the file."""
        position = self._after_header
        while len(start := self._at(position, LENGTHS.size)) == LENGTHS.size:
            magic, *lengths = LENGTHS.unpack(start)
            size = LENGTHS.size + sum(lengths) + CRC.size
            if magic != CHUNK_MAGIC or position + size > self._bytes:
                return
            yield Record(position, size, 0)
            position += size

    def _at(self, offset: int, length: int) -> bytes:
        """At most `length` bytes of the file."""
        self._file.seek(offset)
        return self._file.read(max(0, min(length, self._bytes - offset)))


def _unpack(coding: bytes, names: bytes, checks: bytes, words: bytes, *, values: int, groups: int) -> Chunk:
    """A chunk of its parts. Raises KeyError, TypeError, ValueError or DataError for what makes no sense. values: of an image.
    groups: of latents."""
    described = json.loads(_inflate(coding))
    batches = tuple(_natural(size) for size in described["batches"])
    first, group = _natural(described.get("first_images", 0)), _natural(described["group"])
    coded, images = sum(batches), first + sum(batches)
    if not 0 < images * values <= MOST_CHUNK_VALUES or min(batches) < 1 or group < 1:
        raise DataError(
            f"it would have {images} images of {values} values; at most {MOST_CHUNK_VALUES} values are decoded at once"
        )
    initial = _natural(described["initial_words"])
    numbers = np.frombuffer(checks, "<u4")
    if len(numbers) != -(-images // group) or initial > MOST_CHUNK_VALUES:
        raise DataError("its checksums or initial words are too many or too few")
    grids = Grids(
        _phases(described["posterior_phases"], groups * coded).reshape(groups, coded),
        _phases(described["pixel_phases"], coded),
        _phases(described.get("prior_phases", []), groups * coded).reshape(groups, coded),
    )
    code = np.frombuffer(words, "<u4").astype(np.uint32)
    return Chunk(
        Coding(code, batches, grids, group, tuple(map(int, numbers)), initial, None, first),
        _unpack_names(json.loads(_inflate(names)), images),
    )


def _pack_names(names: Names) -> dict[str, Any]:
    """Names for JSON: keys that count up are their first one, runs of slots are their first one and their number."""
    return {
        "split": names.split,
        "keys": _counted(names.keys) or list(names.keys),
        "labels": list(names.labels),
        "slots": _runs(names.slots),
        **({} if names.vectors is None else {"vectors": _packed_vectors(names.vectors)}),
    }


def _packed_vectors(vectors: NDArray[np.float32]) -> str:
    return base64.b64encode(vectors.astype("<f4").tobytes()).decode()


def _unpack_names(packed: dict[str, Any], images: int) -> Names:
    keys = packed["keys"]
    if isinstance(keys, dict):
        prefix, first, width = str(keys["prefix"]), _natural(keys["first"]), _natural(keys["width"])
        if width > 20 or len(prefix) > 4096:
            raise DataError("its keys are too long")
        keys = [f"{prefix}{number:0{width}d}" for number in range(first, first + images)]
    runs = [(_natural(first), _natural(number)) for first, number in packed["slots"]]
    labels = tuple(np.array([int(label) for label in packed["labels"]], np.int64).tolist())
    if sum(number for _, number in runs) != images or len(labels) != images or len(keys) != images:
        raise DataError("it has not as many names as images")
    slots = tuple(slot for first, number in runs for slot in range(first, first + number))
    vectors = None
    if "vectors" in packed:
        content = base64.b64decode(packed["vectors"], validate=True)
        vectors = np.frombuffer(content, "<f4").reshape(images, -1).astype(np.float32)
    return Names(str(packed["split"]), tuple(map(str, keys)), labels, slots, vectors)


def _counted(keys: tuple[str, ...]) -> dict[str, Any] | None:
    """A prefix with the first of consecutive numbers of equal width, if the keys are such."""
    digits = len(keys[0]) - len(keys[0].rstrip("0123456789"))
    if not 0 < digits <= 18 or not keys[0].isascii():
        return None
    prefix, first = keys[0][:-digits], int(keys[0][-digits:])
    if any(key != f"{prefix}{number:0{digits}d}" for number, key in enumerate(keys, start=first)):
        return None
    return {"prefix": prefix, "first": first, "width": digits}


def _runs(slots: tuple[int, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1][1] += 1
        else:
            runs.append([slot, 1])
    return runs


def _phases(pairs: list[list[int]], count: int) -> Phases:
    phases = np.zeros(count, np.uint8)
    for number, phase in pairs:
        if not (_natural(number) < count and _natural(phase) < PHASES):
            raise DataError("a phase is out of range")
        phases[number] = phase
    return phases


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value


def _inflate(content: bytes) -> bytes:
    """Unpack zlib content. Raises DataError beyond a bound or where it is damaged."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(content, MOST_UNPACKED_BYTES)
    except zlib.error:
        raise DataError("a part cannot be unpacked") from None
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise DataError(f"a part unpacks to more than {MOST_UNPACKED_BYTES} bytes, or is cut")
    return unpacked
