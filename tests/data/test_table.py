"""The table of a split: the same in a dry run, in the index of its shards, and where people look."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vaescale.commands.make_shards import make_shards
from vaescale.data.index import INDEX, parse_index
from vaescale.data.making.table import Counts, table_rows
from vaescale.data.making.writing import NOTES


def fill(folder: Path) -> Path:
    """Two classes, two shapes, an image that cannot be used, and a file that is none."""
    for name, size in (("ant/1.png", (4, 4)), ("ant/2.png", (4, 4)), ("bee/3.jpg", (6, 5))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 120, 40)).save(folder / name)
    (folder / "bee" / "4.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    return folder


def test_the_table_of_a_dry_run_is_that_of_the_index(tmp_path: Path, vaescale) -> None:
    source = f"folder:{fill(tmp_path / 'in')}"
    looked = make_shards(source, tmp_path / "out", dry_run=True, holdout=0)["train"]
    written = make_shards(source, tmp_path / "out", skip_broken=True, holdout=0)["train"]
    table = written["made"]["table"]
    assert table == {name: looked[name] for name in table}
    assert table["images"] == written["samples"] == 3
    assert table["classes"] == {"ant": 2, "bee": 1}
    assert table["shapes"] == {"4x4x3 png": 2, "5x6x3 jpg": 1}
    assert table["passed_over"]["format"]["images"] == 1
    assert "bee/4.png: it is empty" in table["passed_over"]["format"]["first"]
    assert table["left_out"] == {".txt": 1}
    again = make_shards(source, tmp_path / "out", skip_broken=True, holdout=0)["train"]
    assert again["made"]["table"] == table, "the table does not make it another set"
    shown = vaescale("verify-shards", tmp_path / "out" / "train")
    assert shown.code == 0
    for words in ("ant 2, bee 1", "4x4x3 png (2), 5x6x3 jpg (1)", "1 .txt", "4.png: it is empty"):
        assert words in shown.out
    assert "are sound" in shown.out.splitlines()[-1]
    as_json = vaescale("verify-shards", tmp_path / "out" / "train", "--json").json
    assert as_json["table"] == table


def test_an_index_without_a_table_is_read_and_has_the_same_hash(tmp_path: Path, vaescale) -> None:
    source = f"folder:{fill(tmp_path / 'in')}"
    made = make_shards(source, tmp_path / "out", skip_broken=True, holdout=0)["train"]
    path = tmp_path / "out" / "train" / INDEX
    content = json.loads(path.read_bytes())
    del content["made"]["table"]
    path.write_text(json.dumps(content))
    assert parse_index(path.read_bytes(), "").data_hash == made["data_hash"]
    shown = vaescale("verify-shards", tmp_path / "out" / "train", "--json")
    assert (shown.code, shown.json["table"]) == (0, None)
    words = ("make-shards", source, tmp_path / "out", "--skip-broken", "--holdout", 0)
    assert "1 images" in vaescale(*words).out, "what was left out is still said"


def test_shards_of_an_earlier_version_are_kept_without_a_table(tmp_path: Path) -> None:
    source = f"folder:{fill(tmp_path / 'in')}"
    options = {"skip_broken": True, "holdout": 0, "shard_samples": 2}
    before = make_shards(source, tmp_path / "out", **options)["train"]
    folder = tmp_path / "out" / "train"
    notes = json.loads((folder / NOTES).read_bytes())
    for note in notes.values():
        del note["made"][4:]
    (folder / NOTES).write_text(json.dumps(notes))
    (folder / "shard-000000.tar").unlink()
    after = make_shards(source, tmp_path / "out", **options)["train"]
    assert after["data_hash"] == before["data_hash"]
    assert "table" not in after["made"], "half of the images are not counted"


def test_long_tables_are_short_rows() -> None:
    counts = Counts()
    for number in range(2000):
        counts.image(f"{number % 30}x4x3 png", number % 1000 if number else 7)
    table = counts.table([f"n{number}" for number in range(1000)], {})
    assert len(table["shapes"]) + table["more_shapes"] == 30
    rows = table_rows(table)
    assert rows["classes"].startswith("1000 of 1 to 3 images: n0 1, n1 2")
    assert max(map(len, rows.values())) < 200
    whole = Counts()
    for part in (counts, counts):
        whole.add(json.loads(json.dumps(part.content())))
    assert whole.table(["n0"], {})["images"] == 4000
    assert np.sum(list(whole.table([f"n{n}" for n in range(1000)], {})["classes"].values())) == 4000
