"""TFRecord files and the examples in them, read without TensorFlow, and not trusted.

A file is a row of records: the length as uint64, its checksum, the content, its checksum, all in little endian. A checksum is a crc32c
(RFC 3720, appendix B.4), rotated and shifted by a constant. The content is a message tf.train.Example in the wire format of protocol
buffers: {1: {1: [{1: name, 2: {1: {1: [bytes]}}}]}}, of which the lists of bytes are read here.
"""

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.errors import DataError

MOST_RECORD_BYTES = 1 << 28
LANES = 1024  # parts of a record whose checksums are computed side by side
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MOST_VARINT_BYTES = 10

Words = NDArray[np.uint32]


class Record(NamedTuple):
    """A record's place: where its content begins, and its bytes."""

    offset: int
    bytes: int


def list_records(path: Path) -> list[Record]:
    """The records of a file, by their lengths alone. Raises DataError for a file that is cut or damaged there."""
    records: list[Record] = []
    try:
        with path.open("rb") as file:
            size, at = file.seek(0, os.SEEK_END), 0
            while at < size:
                file.seek(at)
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    raise DataError(
                        f"{path} is cut in the length of record {len(records)} at byte {at}; fetch it again"
                    )
                length, stated = _HEADER.unpack(header)
                if masked(crc32c(header[:8])) != stated:
                    raise DataError(
                        f"{path} has a wrong crc32c of the length of record {len(records)} at byte {at}: it is damaged or no TFRecord file; "
                        "fetch it again"
                    )
                end = at + _HEADER.size + length + _FOOTER.size
                if length > MOST_RECORD_BYTES or end > size:
                    what = f"more than {MOST_RECORD_BYTES}" if length > MOST_RECORD_BYTES else "and is cut"
                    raise DataError(
                        f"{path} has a record of {length} bytes at byte {at}, {what}; fetch it again"
                    )
                records.append(Record(at + _HEADER.size, length))
                at = end
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return records


def read_records(path: Path, records: list[Record]) -> Iterator[bytes | None]:
    """The content of each record, None where it does not have its checksum. Raises DataError."""
    try:
        with path.open("rb") as file:
            for record in records:
                file.seek(record.offset)
                content = file.read(record.bytes)
                footer = file.read(_FOOTER.size)
                sound = len(footer) == _FOOTER.size and masked(crc32c(content)) == _FOOTER.unpack(footer)[0]
                yield content if sound else None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def bytes_features(content: bytes) -> dict[str, bytes]:
    """The first bytes of each feature of a tf.train.Example that has some, by name. Raises ValueError for another message."""
    features: dict[str, bytes] = {}
    for entry in _inner(content, 1, 1):
        parts = dict(_fields(entry))
        name, feature = parts.get(1), parts.get(2)
        if not isinstance(name, memoryview) or not isinstance(feature, memoryview):
            raise ValueError("a feature has no name or no value")
        if (value := next(_inner(feature, 1, 1), None)) is not None:
            features[bytes(name).decode(errors="replace")] = bytes(value)
    return features


def masked(crc: int) -> int:
    """The form in which files have a crc32c: rotated to the right by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(content: bytes) -> int:
    """The crc32c of bytes.

    A register of a checksum without inversions is linear in the bytes and unchanged by leading zeros: equal parts are summed side by
    side, and joined in pairs. The first inversion is that of the first four bytes.
    """
    table = _table()
    if len(content) < 4 * LANES:
        crc = 0xFFFFFFFF
        for byte in content:
            crc = int(table[(crc ^ byte) & 0xFF]) ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    size = -(-len(content) // LANES)
    padded = np.zeros(LANES * size, np.uint8)
    start = len(padded) - len(content)
    padded[start:] = np.frombuffer(content, np.uint8)
    padded[start : start + 4] ^= 0xFF
    crcs = np.zeros(LANES, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(LANES, size).T):
        crcs = table[(crcs ^ column) & 0xFF] ^ crcs >> 8
    for level in range(LANES.bit_length() - 1):
        crcs = _moved(crcs[0::2], _shift(size, level)) ^ crcs[1::2]
    return int(crcs[0]) ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _table() -> Words:
    """The register after each byte, from a register of 0, [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


@lru_cache(maxsize=256)
def _shift(size: int, level: int) -> Words:
    """Where `size` 2^level bytes of zeros take each bit of a register, [32]."""
    if level:
        half = _shift(size, level - 1)
        return _moved(half, half)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    table = _table()
    for _ in range(size):
        bits = table[bits & 0xFF] ^ bits >> 8
    return bits


def _moved(crcs: Words, shift: Words) -> Words:
    """Registers after zeros, by where these take each bit."""
    moved = np.zeros_like(crcs)
    for bit in range(32):
        moved ^= np.where(crcs >> bit & 1, shift[bit], np.uint32(0))
    return moved


def _inner(content: bytes | memoryview, *numbers: int) -> Iterator[memoryview]:
    """The messages or bytes in the fields of these numbers, one inside the other."""
    for number, value in _fields(content):
        if number == numbers[0] and isinstance(value, memoryview):
            if len(numbers) == 1:
                yield value
            else:
                yield from _inner(value, *numbers[1:])


def _fields(content: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: their numbers, and integers or bytes. Raises ValueError for bytes that are none."""
    view, at = memoryview(content), 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(view, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(view, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
        if size > len(view) - at:
            raise ValueError(f"a field of {size} bytes exceeds its message")
        yield number, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(_MOST_VARINT_BYTES):
        if at + place >= len(view):
            raise ValueError("an integer is cut")
        byte = view[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("an integer has too many bytes")
