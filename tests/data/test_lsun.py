"""LSUN's databases: splits and categories by their names, any bytes as keys, and faults in one sentence."""

import io
from pathlib import Path

import pytest
from PIL import Image

from vaescale.commands.make_shards import make_shards
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.lsun import key_of
from vaescale.data.pictures import decode
from vaescale.errors import DataError

lmdb = pytest.importorskip("lmdb")


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value,) * 3).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def database(folder: Path, rows: dict[bytes, int]) -> Path:
    folder.mkdir(parents=True)
    with (
        lmdb.open(str(folder), map_size=1 << 22) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in rows.items():
            transaction.put(key, picture(value))
    (folder / "lock.mdb").unlink()
    return folder


def listed(argument: str, **options: object) -> dict[str, list[tuple[str, str, int]]]:
    result = {}
    for name, split in open_source(argument, **{"holdout": 0, **options}).splits.items():
        whole = split()
        names = (*whole.class_names, "")
        rows = [(item.key, names[item.label], int(decode(item.content)[0, 0, 0])) for item in whole.items]
        assert whole.number in (None, len(rows))
        result[name] = rows
    return result


def test_one_category(tmp_path: Path) -> None:
    train = database(tmp_path / "church_outdoor_train_lmdb", {b"a%d" % n: n for n in range(5)})
    database(tmp_path / "church_outdoor_val_lmdb", {b"b": 77})
    splits = listed(f"lsun:{tmp_path}")
    assert splits == {"train": [(f"a{n}", "", n) for n in range(5)], "val": [("b", "", 77)]}
    assert listed(f"lsun:{train}") == listed(f"lsun:{train}/data.mdb") == {"train": splits["train"]}
    assert listed(f"lsun:{tmp_path}/church_outdoor_val_lmdb") == {"val": splits["val"]}
    assert {file.name for file in train.iterdir()} == {"data.mdb"}, "opened without a lock"


def test_several_categories_are_classes_and_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database(tmp_path / "bedroom_train_lmdb", {b"%d" % n: n for n in range(8)})
    database(tmp_path / "tower_train_lmdb", {b"%d" % n: 100 + n for n in range(4)})
    database(tmp_path / "tower_val_lmdb", {b"%d" % n: 200 + n for n in range(2)})
    splits = listed(f"lsun:{tmp_path}")
    classes = [name for _, name, _ in splits["train"]]
    assert classes == ["bedroom", "tower", "bedroom"] * 4
    assert [value for _, name, value in splits["train"] if name == "tower"] == [100, 101, 102, 103]
    assert splits["val"] == [("tower/0", "tower", 200), ("tower/1", "tower", 201)]
    assert "val has no image of 1 of 2 classes (bedroom)" in capsys.readouterr().err


def test_any_bytes_are_keys_and_different_ones_stay_different(tmp_path: Path) -> None:
    keys = [b"a.b", b"a%2Eb", b"\xff\x00", b"../x", b"/etc", b"plain-key_1", b"~", "\u00e4".encode()]
    assert len({key_of(key) for key in keys}) == len(keys)
    assert key_of(b"plain-key_1") == "plain-key_1"
    rows = {key: number for number, key in enumerate(keys)}
    folder = database(tmp_path / "x_train_lmdb", rows)
    result = make_shards(f"lsun:{folder}", tmp_path / "out", holdout=0.4)
    assert {split: one["skipped"] for split, one in result.items()} == {"train": 0, "val": 0}
    assert sum(one["samples"] for one in result.values()) == len(keys), "each is in train or in val"
    assert make_shards(f"lsun:{folder}", tmp_path / "few", holdout=0, limit=2)["train"]["samples"] == 2


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data\.mdb"):
        open_source(f"lsun:{tmp_path}")
    database(tmp_path / "z" / "tower_train_lmdb", {b"x": 1})
    with pytest.raises(DataError, match=r"did you mean lsun:.*tower_train_lmdb\?"):
        open_source(f"folder:{tmp_path}/z").splits["train"]()
    (tmp_path / "tower_train_lmdb.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack .*tower_train_lmdb\.zip first"):
        open_source(f"lsun:{tmp_path}")
    cut = database(tmp_path / "a" / "cut_train_lmdb", {b"%d" % n: n for n in range(200)})
    content = (cut / "data.mdb").read_bytes()
    (cut / "data.mdb").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"is cut: it has .*fetch it again"):
        open_source(f"lsun:{cut}").splits["train"]()
    other = tmp_path / "b"
    other.mkdir()
    (other / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(DataError, match=r"b is no sound LMDB"):
        open_source(f"lsun:{other}").splits["train"]()
    empty = database(tmp_path / "empty", {})
    with pytest.raises(DataError, match="holds no images"):
        open_source(f"lsun:{empty}").splits["train"]()
    database(tmp_path / "c" / "tower_val_lmdb", {b"x": 1})
    database(tmp_path / "c" / "tower_VAL_lmdb", {b"x": 1})
    with pytest.raises(DataError, match="of one category and split"):
        open_source(f"lsun:{tmp_path}/c")
