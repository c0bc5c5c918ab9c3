"""Each kind of damage is found and named with shard, member and place; what is sound is said to be."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vaescale.data.index import INDEX, parse_entries, parse_index
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.verifying import verify_shards
from vaescale.data.making.writing import write_shards
from vaescale.errors import DataError

TAR = "shard-000001.tar"


@pytest.fixture
def folder(tmp_path: Path, make_items) -> Path:
    write_shards(make_items(25), tmp_path / "shards", Making(shard_samples=10, encoding="png"))
    return tmp_path / "shards"


def place_of(folder: Path, key: str) -> tuple[int, int]:
    index = parse_index((folder / INDEX).read_bytes(), "")
    shard = next(shard for shard in index.shards if shard.name == TAR)
    entries = parse_entries((folder / shard.entries_name).read_bytes(), shard, "")
    entry = next(entry for entry in entries if entry["key"].decode() == key)
    return int(entry["offset"]), int(entry["bytes"])


def change(folder: Path, place: int, content: bytes) -> None:
    with (folder / TAR).open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_sound_is_said_to_be(folder: Path, deep: bool, jobs: int) -> None:
    seen = []
    assert verify_shards(str(folder), deep=deep, jobs=jobs, progress=lambda *args: seen.append(args)) == (
        25,
        [],
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda f: (f / TAR).unlink(), "", "cannot be read"),
    "longer": (lambda f: (f / TAR).write_bytes((f / TAR).read_bytes() + b"x" * 512), "", "bytes, the index says"),
    "cut": (lambda f: (f / TAR).write_bytes((f / TAR).read_bytes()[:5000]), "", "bytes, the index says"),
    "image changed": (lambda f: change(f, place_of(f, "00013")[0] + 40, b"\x07\x08"), "00013", "not those that were indexed"),
    "class changed": (lambda f: change(f, place_of(f, "00013")[0] - 1024, b"9"), "00013", "and class 9"),
    "padding changed": (lambda f: change(f, sum(place_of(f, "00013")) + 3, b"x"), "", "outside of any image"),
    "header corrupt": (lambda f: change(f, place_of(f, "00013")[0] - 512, b"ZZ"), "00013", "is corrupt"),
    "entries missing": (lambda f: (f / "shard-000001.index.npy").unlink(), "", "cannot be read"),
    "entries of another": (
        lambda f: (f / "shard-000001.index.npy").write_bytes((f / "shard-000000.index.npy").read_bytes()),
        "",
        "not the one",
    ),
    "not in the index": (lambda f: (f / "shard-000009.tar").write_bytes(b""), "", "training does not see it"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, member, words = DAMAGE[name]
    damage(folder)
    _, faults = verify_shards(str(folder))
    assert any(words in fault.words and member in fault.member for fault in faults), faults
    assert {fault.shard for fault in faults} == {"shard-000009.tar" if "training" in words else TAR}
    assert all(fault.offset >= 0 for fault in faults if fault.member)


def test_an_image_that_does_not_decode_is_found_by_looking_deep(tmp_path: Path, make_items) -> None:
    """It was damaged before it was indexed, so that its hashes agree."""
    from webdataset import TarWriter

    from vaescale.data.making.indexing import index_shards

    buffer = io.BytesIO()
    np.save(buffer, make_items(1)[0].content)
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "sound", "npy": buffer.getvalue()})
        tar.write({"__key__": "cut", "npy": buffer.getvalue()[:-5]})
    index_shards(tmp_path)
    assert verify_shards(str(tmp_path)) == (2, [])
    _, (fault,) = verify_shards(str(tmp_path), deep=True)
    assert (fault.shard, fault.member) == ("a.tar", "cut")
    assert fault.offset > 0


def test_shards_swapped_under_one_name_are_found(folder: Path) -> None:
    a, b = (folder / f"shard-00000{i}.tar" for i in (0, 1))
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    _, faults = verify_shards(str(folder))
    assert {fault.shard for fault in faults} == {a.name, b.name}
    assert len([fault for fault in faults if fault.words == "it is not in the index"]) == 20


def test_without_an_index_it_says_how_to_get_one(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(DataError, match="--index-only"):
        verify_shards(str(folder))


def test_json(vaescale, folder: Path) -> None:
    assert vaescale("verify-shards", folder, "--json").json["faults"] == []
    change(folder, place_of(folder, "00013")[0] + 40, b"\x07\x08")
    outcome = vaescale("verify-shards", folder, "--json", "--deep")
    assert outcome.code == 3
    (fault,) = json.loads(outcome.out)["faults"]
    assert fault["member"] == "00013"
    told = vaescale("verify-shards", folder)
    assert told.code == 3
    assert told.out.startswith(
        f"{TAR} member '00013' at byte {place_of(folder, '00013')[0]}: its bytes are not"
    )
    vaescale("verify-shards", folder / "nowhere").assert_refused(3, "does not exist")


def test_a_sample_of_another_key_is_named(tmp_path: Path, make_items) -> None:
    items = make_items(3)
    write_shards(items, tmp_path / "a")
    write_shards([items[0], Item("other", items[1].content, 1), items[2]], tmp_path / "b")
    (tmp_path / "a" / "shard-000000.tar").write_bytes((tmp_path / "b" / "shard-000000.tar").read_bytes())
    _, faults = verify_shards(str(tmp_path / "a"))
    assert {fault.member for fault in faults} == {"other", "00001"}
