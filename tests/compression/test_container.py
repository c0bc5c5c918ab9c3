"""Files: what is written is read, and what is damaged or made to harm is refused or named."""

import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaescale.compression import container
from vaescale.compression.bits_back import Grids
from vaescale.compression.chunks import Coding, describe
from vaescale.compression.container import (
    CRC,
    HEADER_LENGTH,
    LENGTHS,
    MAGIC,
    TABLE_MAGIC,
    TRAILER,
    Chunk,
    Names,
    Reader,
    Record,
    pack_chunk,
    pack_header,
    pack_table,
)
from vaescale.errors import DataError

SHAPE = (1, 2, 2)


def chunk_of(number: int, **names: Any) -> Chunk:
    phases = np.zeros(number, np.uint8)
    phases[-1] = 7
    coding = Coding(
        np.arange(9, dtype=np.uint32),
        (1, number - 1),
        Grids(phases[None], phases * 0, phases[None] * 0),
        2,
        (5,) * -(-number // 2),
        6,
    )
    given = {"split": "test", "keys": tuple(f"a/{n:04d}" for n in range(number)), "labels": (-1,) * number}
    return Chunk(coding, Names(**{**given, "slots": (*range(3, 3 + number - 1), 40), **names}))


def write(path: Path, *chunks: bytes, header: dict[str, Any] | None = None) -> Path:
    content, records = pack_header(header or {"run": "runs/x"}), list[Record]()
    for chunk in chunks:
        records.append(Record(len(content), len(chunk), 3))
        content += chunk
    path.write_bytes(content + pack_table(records, len(content)))
    return path


def altered(**changes: Any) -> bytes:
    """A chunk of three images whose description says other things, with a right checksum."""
    chunk = chunk_of(3)
    described = {**describe(chunk.coding), **changes}
    parts = [
        zlib.compress(json.dumps(described).encode()),
        zlib.compress(json.dumps(container._pack_names(chunk.names)).encode()),
        np.array(chunk.coding.checks, "<u4").tobytes(),
        chunk.coding.words.tobytes(),
    ]
    content = b"".join([LENGTHS.pack(b"VSZC", *map(len, parts)), *parts])
    return content + CRC.pack(zlib.crc32(content))


@pytest.mark.parametrize("keys", [("a/0008", "a/0009", "a/0010"), ("a", "b", "../c"), ("9", "10", "11")])
def test_what_is_written_is_read(tmp_path: Path, keys: tuple[str, ...]) -> None:
    chunks = [chunk_of(3, keys=keys), chunk_of(4, labels=(2, 0, -1, 1))]
    path = write(tmp_path / "file.vsz", *map(pack_chunk, chunks), header={"run": "runs/y"})
    with Reader(path) as reader:
        assert reader.is_whole
        assert reader.header["run"] == "runs/y"
        for number, chunk in enumerate(chunks):
            got = reader.chunk(number, SHAPE)
            assert got.names == chunk.names
            assert got.coding[1:2] + got.coding[3:6] == chunk.coding[1:2] + chunk.coding[3:6]
            assert got.coding.words.tolist() == chunk.coding.words.tolist()
            assert [g.tolist() for g in got.coding.grids] == [g.tolist() for g in chunk.coding.grids]
    assert container.part_bytes(pack_chunk(chunks[0]))["code"] == 36


def test_a_chunk_of_several_groups_and_with_first_images(tmp_path: Path) -> None:
    chunk = chunk_of(5)
    phases = np.arange(9, dtype=np.uint8).reshape(3, 3)
    coding = chunk.coding._replace(
        batches=(1, 2), grids=Grids(phases, phases[0], 7 + phases), first_images=2, group=5, checks=(1,)
    )
    path = write(tmp_path / "file.vsz", pack_chunk(chunk._replace(coding=coding)))
    with Reader(path) as reader:
        got = reader.chunk(0, SHAPE, groups=3).coding
        assert (got.images, got.first_images, got.batches) == (5, 2, (1, 2))
        assert [g.tolist() for g in got.grids] == [g.tolist() for g in coding.grids]
        with pytest.raises(DataError, match="phase is out of range"):
            reader.chunk(0, SHAPE, groups=2)


def test_a_file_that_is_cut_gives_the_chunks_before(tmp_path: Path) -> None:
    whole = write(tmp_path / "file.vsz", *(pack_chunk(chunk_of(n)) for n in (2, 3, 4))).read_bytes()
    with Reader(tmp_path / "file.vsz") as reader:
        third = reader.records[2].offset
    (tmp_path / "cut.vsz").write_bytes(whole[: third + 40])
    with Reader(tmp_path / "cut.vsz") as reader:
        assert not reader.is_whole
        assert len(reader.records) == 2
        assert len(reader.chunk(1, SHAPE).names.keys) == 3


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path / "file.vsz", pack_chunk(chunk_of(2)), pack_chunk(chunk_of(3))).read_bytes()
    for place in [*range(60), *range(60, len(content), 5)]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "file.vsz").write_bytes(damaged)
        faults = 0
        try:
            with Reader(tmp_path / "file.vsz") as reader:
                faults += not reader.is_whole
                for number in range(len(reader.records)):
                    try:
                        reader.chunk(number, SHAPE)
                    except DataError:
                        faults += 1
        except DataError:
            faults += 1
        assert faults, f"byte {place} of {len(content)}"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"batches": [1 << 40]}, "at most"),
        ({"batches": [-1, 4]}, "invalid"),
        ({"batches": [0, 3]}, "at most"),
        ({"batches": "xyz"}, "invalid"),
        ({"batches": [3.0]}, "invalid"),
        ({"group": 0}, "invalid|at most"),
        ({"group": 1}, "too many or too few"),
        ({"initial_words": 1 << 50}, "too many or too few"),
        ({"pixel_phases": [[9, 1]]}, "phase is out of range"),
        ({"pixel_phases": [[0, 256]]}, "phase is out of range"),
        ({"pixel_phases": [[0]]}, "invalid"),
        ({"prior_phases": [[3, 1]]}, "phase is out of range"),
        ({"first_images": 1 << 40}, "at most"),
        ({"first_images": -1}, "invalid"),
        ({"first_images": 2}, "too many or too few"),
        ({"padding": "0" * (1 << 17)}, "unpacks to more than"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "MOST_UNPACKED_BYTES", 1 << 16)
    with (
        Reader(write(tmp_path / "file.vsz", altered(**changes))) as reader,
        pytest.raises(DataError, match=fault),
    ):
        reader.chunk(0, SHAPE)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    nested = zlib.compress(b"[" * (1 << 16) + b"]" * (1 << 16))
    header = MAGIC + b"\x01" + HEADER_LENGTH.pack(len(nested)) + nested
    (tmp_path / "header.vsz").write_bytes(header + CRC.pack(zlib.crc32(header)))
    with pytest.raises(DataError, match="is no JSON"):
        Reader(tmp_path / "header.vsz")
    parts = [LENGTHS.pack(b"VSZC", len(nested), 0, 0, 0), nested]
    chunk = b"".join([*parts, CRC.pack(zlib.crc32(b"".join(parts)))])
    start = pack_header({"run": "runs/x"}) + chunk
    trailer = TRAILER.pack(len(start), len(nested), zlib.crc32(nested), TABLE_MAGIC)
    (tmp_path / "table.vsz").write_bytes(start + nested + trailer)
    with Reader(tmp_path / "table.vsz") as reader:
        assert not reader.is_whole
        with pytest.raises(DataError, match=r"invalid \(RecursionError"):
            reader.chunk(0, SHAPE)


def test_lengths_beyond_the_file_or_a_bound_are_refused(tmp_path: Path) -> None:
    chunk = pack_chunk(chunk_of(3))
    long = bytearray(chunk)
    struct.pack_into("<I", long, 4, 0xFFFFFFFF)
    long[-4:] = CRC.pack(zlib.crc32(bytes(long[:-4])))
    with (
        Reader(write(tmp_path / "long.vsz", bytes(long))) as reader,
        pytest.raises(DataError, match="do not fill"),
    ):
        reader.chunk(0, SHAPE)
    path = write(tmp_path / "head.vsz", chunk)
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, len(MAGIC) + 1, 0xFFFFFFFF)
    path.write_bytes(content)
    with pytest.raises(DataError, match="header of 4294967295 bytes"):
        Reader(path)
    with Reader(write(tmp_path / "big.vsz", chunk)) as reader:
        reader.records[0] = Record(0, 1 << 40, 3)
        with pytest.raises(DataError, match="are read"):
            reader.chunk(0, SHAPE)


def test_memory_holds_one_chunk(tmp_path: Path) -> None:
    chunk = chunk_of(3)
    one = pack_chunk(chunk._replace(coding=chunk.coding._replace(words=np.arange(1 << 16, dtype=np.uint32))))
    path = write(tmp_path / "file.vsz", *[one] * 60)
    tracemalloc.start()
    try:
        with Reader(path) as reader:
            for number in range(60):
                reader.chunk(number, SHAPE)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 50 * len(one)
    assert most < 6 * len(one)


def test_files_of_another_kind_or_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.vsz"
    for content, fault in (
        (b"", "no .vsz"),
        (b"PNG" * 40, "no .vsz"),
        (MAGIC + b"\x03" + bytes(40), "version 3 .* reads 1 and 2"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=fault):
            Reader(path)
    with pytest.raises(DataError, match="cannot be read"):
        Reader(tmp_path / "absent.vsz")
