"""The index: what is written is read, and nothing in it is trusted."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vaescale.data.index import (
    Shard,
    ShardIndex,
    ShardTable,
    entries_content,
    index_content,
    make_entries,
    parse_entries,
    parse_index,
)
from vaescale.errors import DataError

ROWS = [(512, 100, 7, 3, "a"), (2048, 50, 2**32 - 1, -1, "ключ/b")]


def entries_shard(content: bytes, **changes) -> Shard:
    import hashlib

    values = {"name": "x y.tar", "bytes": 10_240, "sha256": "0" * 64, "samples": 2}
    return Shard(
        **{**values, **changes},
        entries_bytes=len(content),
        entries_sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def index() -> ShardIndex:
    shards = [Shard(f"a b-{i}.tar", 10_240, f"{i:064x}", 10 + i, 300, "f" * 64) for i in range(3)]
    return ShardIndex(
        "DIR", ShardTable.of(shards), (8, 8, 1), ("cat", "dog"), {"source": "digits", "skipped": 0}
    )


def test_an_index_comes_back(index) -> None:
    again = parse_index(index_content(index), "DIR")
    assert list(again.shards) == list(index.shards)
    assert again._replace(shards=index.shards) == index
    assert again.num_samples == 33
    assert again.num_bytes == 30_720
    assert again.shards[1:] == list(index.shards)[1:]
    assert again.data_hash == index.data_hash


def test_images_of_several_shapes_are_no_shape(index) -> None:
    assert parse_index(index_content(index._replace(image=None)), "DIR").image is None


def test_the_data_hash_is_of_the_content(index) -> None:
    def with_shard(**changes) -> str:
        shards = [index.shards[0]._replace(**changes), *index.shards[1:]]
        return index._replace(shards=ShardTable.of(shards)).data_hash

    assert with_shard(sha256="e" * 64) != index.data_hash
    assert with_shard(entries_sha256="e" * 64) != index.data_hash
    assert with_shard(name="other.tar") == index.data_hash


def _row(position: int, value: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        words = content["shards"][0].split(" ", 5)
        words[position] = value
        content["shards"][0] = " ".join(words)

    return change


FAULTS: dict[str, Callable[[dict], object]] = {
    "another version": lambda c: c.update(version=99),
    "another format": lambda c: c.update(format="tfrecord"),
    "no shards": lambda c: c.update(shards=[]),
    "shards are a word": lambda c: c.update(shards="abc"),
    "a row is a list": lambda c: c.update(shards=[["a"]]),
    "a number is a word": _row(0, "many"),
    "negative": _row(0, "-1"),
    "zero samples": _row(2, "0"),
    "short hash": _row(1, "abc"),
    "not a tar": _row(5, "shard.zip"),
    "path escapes": _row(5, "../shard-000000.tar"),
    "absolute path": _row(5, "/etc/passwd.tar"),
    "windows path": _row(5, "..\\shard.tar"),
    "unprintable": _row(5, "a\nb.tar"),
    "infinite": lambda c: c["image"].update(height=float("inf")),
    "seventeen channels": lambda c: c["image"].update(channels=17),
    "unknown key": lambda c: c.update(more=1),
    "named twice": lambda c: c.update(shards=[c["shards"][0]] * 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_in_one_sentence(index, fault: str) -> None:
    content = json.loads(index_content(index))
    FAULTS[fault](content)
    with pytest.raises(DataError) as caught:
        parse_index(json.dumps(content).encode(), "DIR")
    assert "\n" not in str(caught.value)
    assert "DIR/index.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_index_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="not a shard index of this version"):
        parse_index(content, "DIR")


def test_entries_come_back() -> None:
    content = entries_content(make_entries(ROWS))
    entries = parse_entries(content, entries_shard(content), "DIR")
    assert [(*map(int, list(e)[:4]), e["key"].decode()) for e in entries] == ROWS


@pytest.mark.parametrize(
    "entries",
    [
        np.zeros(2, np.int64),
        np.zeros((2, 5), np.int64),
        make_entries(ROWS[:1]),
        make_entries([(10_000, 500, 0, 0, "a"), ROWS[1]]),
        make_entries([(-1, 5, 0, 0, "a"), ROWS[1]]),
        make_entries([(1, -5, 0, 0, "a"), ROWS[1]]),
        make_entries([(2**63 - 1, 2**63 - 1, 0, 0, "a"), ROWS[1]]),
    ],
    ids=["dtype", "columns", "too few", "beyond", "before", "negative", "overflow"],
)
def test_entries_that_do_not_fit_are_refused(entries) -> None:
    content = entries_content(entries)
    with pytest.raises(DataError):
        parse_entries(content, entries_shard(content), "DIR")


def test_entries_of_another_index_are_refused() -> None:
    content = entries_content(make_entries(ROWS))
    with pytest.raises(DataError, match=r"not the one that index.json was written with"):
        parse_entries(content + b"x", entries_shard(content), "DIR")


def test_pickled_entries_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(["a plain word"], dtype=object), allow_pickle=True)
    content = (tmp_path / "x.npy").read_bytes()
    with pytest.raises(DataError, match="does not hold 2 entries"):
        parse_entries(content, entries_shard(content), "DIR")
