"""The reader of plain pickles agrees with `pickle` on plain data, and refuses everything else without doing anything."""

import datetime
import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaescale.data.making.sources.plain_pickle import SHORT_BYTES, read_plain
from vaescale.data.making.sources.stored import Raw, Stored
from vaescale.errors import DataError

BATCH = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)


def plain(value: Any) -> Any:
    return value.whole() if isinstance(value, Stored) else value


def alike(one: Any, other: Any) -> bool:
    if isinstance(other, np.ndarray):
        return (
            one.dtype == other.dtype.newbyteorder("=")
            and one.shape == other.shape
            and np.array_equal(one, other)
        )
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_reads_what_pickle_reads(protocol: int, tmp_path: Path) -> None:
    content = {
        "data": BATCH,
        "small": BATCH[:2, :5].copy(),
        "turned": np.asfortranarray(BATCH[:4, :6]),
        "part": BATCH[::2, 5:20],
        "mean": np.linspace(0, 1, 12).reshape(3, 4),
        "big endian": np.arange(6, dtype=">i4"),
        "labels": [1, 255, 256, 70000, -5, 2**40],
        "mixed": [b"bytes", "text \u00e9", 1.5, None, True, (1, 2), (1, 2, 3, 4), {"a": []}],
        "empty": b"",
        "scalars": [np.int64(7), np.float32(0.5)],
        "twice": BATCH,
    }
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_plain(path)
    content["scalars"] = [7, 0.5]
    assert found.keys() == content.keys()
    for key, value in content.items():
        assert alike(plain(found[key]), value), key
    if protocol > 2:  # Python 3 writes bytes as text in protocol 2
        assert isinstance(found["data"], Raw), "large arrays stay in the file"


def text(value: bytes) -> bytes:
    return (
        b"U" + bytes([len(value)]) + value
        if len(value) < 256
        else b"T" + struct.pack("<i", len(value)) + value
    )


def of_python_2(array: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2's cPickle writes of {"data": array, "labels": labels} with protocol 2."""
    dtype = (
        b"cnumpy\ndtype\nq\x05"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(b"M" + struct.pack("<H", length) for length in array.shape) + b"\x86"
    rebuilt = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        + text(b"b")
        + b"\x87Rq\x04"
    )
    data = rebuilt + b"(K\x01" + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    listed = b"]q\x07(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"data") + data + text(b"labels") + listed + b"u."


def test_it_reads_what_python_2_wrote(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(of_python_2(BATCH, [3, 1, 4]))
    reference = pickle.loads(path.read_bytes(), encoding="bytes")  # noqa: S301  # written above
    found = read_plain(path)
    assert isinstance(found["data"], Raw)
    assert found["data"].nbytes > SHORT_BYTES
    assert np.array_equal(found["data"].whole(), reference[b"data"])
    assert found["labels"] == reference[b"labels"] == [3, 1, 4]


class Harmless:
    """An object of a class."""


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {1, 2}}, "set"),
        ({"a": frozenset({1})}, "frozenset"),
        ({"a": datetime.date(2020, 1, 2)}, "datetime.date"),
        ({"a": Path("x")}, "pathlib"),
        ({"a": Harmless()}, "copy_reg|test_plain_pickle.Harmless"),
        ({"a": np.array([{}], dtype=object)}, "dtype O8|dtype O"),
        ({"a": np.array(["x"])}, "dtype U1"),
        ({"a": np.zeros(2, [("x", "u1")])}, "dtype V1"),
        ({"a": len}, "builtins.len|__builtin__.len"),
        ({(1, 2): 3}, "a dict with a tuple as a key"),
        ([1, 2], "a list"),
        (BATCH, "a numpy array"),
        ({"a": np.ndarray}, "a class"),
    ],
)
def test_it_refuses_what_is_not_plain(value: Any, named: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(DataError, match=rf"batch is a pickle that holds .*({named}).*numpy\.savez"):
        read_plain(path)


def test_a_name_is_not_called_in_another_way_than_arrays_do(tmp_path: Path) -> None:
    for name, call in {
        "_codecs.encode": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00base64\x86R",
        "numpy.dtype": b"cnumpy\ndtype\nK\x01\x85R",
        "numpy.ndarray": b"cnumpy\nndarray\nK\x01\x85R",
        "builtins.bytes": b"c__builtin__\nbytes\nK\x09\x85R",
    }.items():
        path = tmp_path / "batch"
        path.write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.")
        pickletools.dis(path.read_bytes(), out=io.StringIO())  # it is well formed
        with pytest.raises(DataError, match=f"a call of {name}"):
            read_plain(path)


def test_every_cut_and_most_changes_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    content = of_python_2(BATCH[:2, :9], [3, 1, 4])
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cannot be read|pickle that holds"):
            read_plain(path)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(600):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            {key: plain(value) for key, value in read_plain(path).items()}
        except DataError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "claim",
    [
        b"T\xff\xff\xff\x7f",
        b"B\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\x00" * 7 + b"\x7f",
        b"\x8b\xff\xff\xff\x7f",
    ],
)
def test_a_length_that_the_file_does_not_have_takes_no_memory(claim: bytes, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x04}" + claim + b"abc.")
    with pytest.raises(DataError, match=r"cannot be read \(it is cut\)|a text of"):
        read_plain(path)
