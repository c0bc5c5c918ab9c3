"""`vaescale score`: the numbers of `evaluate` for each image, any folder, tables, AUROC, and what is refused."""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from vaescale.commands.evaluate import evaluate
from vaescale.commands.score import score
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained run."""
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Colour photographs of several shapes, one of them cut, and a text."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        size = (int(generator.integers(20, 40)), 30, 3)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_means_are_those_of_evaluate(run: Path, digits: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = score(run, str(digits / "val"), out=tmp_path / "out" / "val.csv")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "it only reads the run"
    expected = evaluate(run)["metrics"]
    rows = rows_of(tmp_path / "out" / "val.csv")
    assert len(rows) == 360
    for name in ("neg_elbo_nats", "kl_nats", "mse", "bits_per_dim"):
        mean = np.mean([float(row[name]) for row in rows])
        assert mean == pytest.approx(expected[name], rel=1e-6), name
        assert result["metrics"]["images"][name] == pytest.approx(expected[name], rel=1e-12), name
    bounds = [float(row["neg_elbo_nats"]) for row in rows]
    assert bounds == sorted(bounds, reverse=True)
    assert "odd" not in rows[0]
    assert {row["class"] for row in rows} == set("0123456789")
    assert [row["name"] for row in result["highest"]] == [row["name"] for row in rows[:10]]
    assert [row["name"] for row in result["lowest"]] == [row["name"] for row in rows[:-11:-1]]
    # The same images from their source, which has all splits.
    again = score(run, "digits", split="val", sort="none")
    assert again["metrics"]["images"] == pytest.approx(result["metrics"]["images"], rel=1e-6)
    assert again["sizing"]["images"]["val"] == {
        "size": 8,
        "crop": "square",
        "resample": "bicubic",
        "channels": 1,
    }
    both = score(run, str(digits), limit=30)
    assert both["metrics"]["images"]["images"] == 60
    assert {row["split"] for row in both["highest"]} == {"train", "val"}


def test_a_folder_of_pictures(vaescale, run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    words = ("score", run, pictures, "--out", out, "--maps", tmp_path / "maps", "--maps-images", 2)
    outcome = vaescale(*words, "--sort", "mse", "--json")
    assert outcome.code == 0, outcome.err
    assert f"skipped (damaged): {pictures}/dog/2.png: " in outcome.err
    assert "files that are no images are left out: 1 .txt" in outcome.err
    rows = rows_of(out)
    assert {row["name"] for row in rows} == {f"{pictures}/{name}.png" for name in ("cat/1", "cat/2", "dog/1")}
    assert {row["class"] for row in rows} == {"cat", "dog"}
    errors = [float(row["mse"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert outcome.json["skipped"]["damaged"]["images"] == 1
    assert outcome.json["sizing"]["images"]["train"]["crop"] == "square"
    for path in outcome.json["maps"]:
        with Image.open(path) as picture:
            assert picture.width > 150
    shown = vaescale(*words)
    assert "cannot be used: damaged" in shown.out
    assert "size 8, crop square, resample bicubic, channels 1" in shown.out
    assert score(run, str(pictures), crop="whole")["metrics"] != outcome.json["metrics"]
    vaescale("score", run, pictures, "--crop", 100).assert_refused(3, "no image can be used", "--crop square")
    vaescale("score", run, pictures, "--crop", "x").assert_refused(2, "--crop (=x)")


def test_odd_images_and_their_auroc(vaescale, run: Path, digits: Path, tmp_path: Path, make_items) -> None:
    write_shards(make_items(50), tmp_path / "noise", Making())
    words = (
        "score",
        run,
        digits / "val",
        "--odd",
        tmp_path / "noise",
        "--complexity",
        "png",
        "--background",
        run,
    )
    out, picture = tmp_path / "scores.parquet", tmp_path / "histograms.png"
    outcome = vaescale(*words, "--odd-class", "7", "--out", out, "--histograms", picture, "--json")
    assert outcome.code == 0, outcome.err
    areas = {one["score"]: one for one in outcome.json["auroc"]}
    assert list(areas) == [name for name in outcome.json["scores"] if name != "bits_per_dim"]
    assert (areas["mse"]["usual_images"], areas["mse"]["odd_images"]) == (324, 50 + 36)
    assert areas["likelihood_ratio_nats"]["auroc"] == 0.5, "the ratio to itself is 1"
    assert 0 < areas["neg_elbo_nats"]["standard_error"] < 0.1
    assert picture.stat().st_size > 1000
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out).to_pydict()
    assert len(table["name"]) == 410
    assert sum(table["odd"]) == 86
    assert all(odd for odd, name in zip(table["odd"], table["class"], strict=True) if name == "7")
    assert table["neg_elbo_nats"] == sorted(table["neg_elbo_nats"], reverse=True)
    for name, area in areas.items():
        assert area["auroc"] == pytest.approx(roc_auc_score(table["odd"], table[name]), rel=1e-9), name
    assert outcome.json["odd_classes"] == ["7"]
    assert outcome.json["metrics"]["odd_images"]["images"] == 50


def test_a_bound_that_misleads_is_said(run: Path, digits: Path, tmp_path: Path) -> None:
    """Black images are more likely than digits: what Nalisnick et al. 2019 saw."""
    black = [Item(str(number), np.zeros((8, 8, 1), np.uint8), -1) for number in range(20)]
    write_shards(black, tmp_path / "black", Making())
    result = score(run, str(digits / "val"), odd=str(tmp_path / "black"), limit=40)
    (bound,) = [one for one in result["auroc"] if one["score"] == "neg_elbo_nats"]
    said = bool(result["notes"])
    assert said == (bound["auroc"] < 0.5)
    upside_down = score(run, str(tmp_path / "black"), odd=str(digits / "val"), limit=40)
    assert bool(upside_down["notes"]) != said
    assert any("prefers simple images" in note for note in [*result["notes"], *upside_down["notes"]])


def test_shards_of_another_size_and_colour_are_brought_to_the_run_s(
    run: Path, tmp_path: Path, make_items
) -> None:
    items = [item for size in (12, 20) for item in make_items(6, shape=(size, 14, 3), seed=size)]
    items = [item._replace(key=f"{number:03d}") for number, item in enumerate(items)]
    write_shards(items, tmp_path / "several", Making())
    shards = score(run, str(tmp_path / "several"), sort="none")
    assert shards["sizing"]["images"]["all"]["crop"] == "square"
    for number, item in enumerate(items):
        path = tmp_path / "files" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(item.content).save(path)
    files = score(run, f"folder:{tmp_path / 'files'}")
    key = "kl_nats"  # needs no draw, and the order of the files is another one
    by_name = {Path(row["name"]).stem: row[key] for row in [*files["highest"], *files["lowest"]]}
    for row in [*shards["highest"], *shards["lowest"]]:
        assert row[key] == pytest.approx(by_name[row["name"]], rel=1e-4)
    assert len(by_name) == 12


def test_the_crop_of_the_run_s_images_is_used(
    vaescale, recipe_file, recipe_content, tmp_path: Path, pictures: Path, make_items
) -> None:
    """A crop in pixels belongs to the images that it was chosen for: other kinds of sources keep their own."""
    recipe_content["data"]["global_batch"] = 16
    for split in ("train", "val"):
        made: dict[str, Any] = {"source": "folder:somewhere"}
        making = Making(size=8, crop=16, resample="box", channels=1)
        write_shards(make_items(16, shape=(20, 18, 3)), tmp_path / "cut" / split, making, made=made)
        recipe_content["data"][split] = str(tmp_path / "cut" / split)
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    run = Path(recipe_content["run_dir"])
    sizing = score(run, str(pictures))["sizing"]["images"]["train"]
    assert sizing == {"size": 8, "crop": 16, "resample": "box", "channels": 1}
    sizing = score(run, "digits", limit=5)["sizing"]["images"]["val"]
    assert sizing == {"size": 8, "crop": "square", "resample": "box", "channels": 1}
    shutil.rmtree(tmp_path / "cut")
    outcome = vaescale("score", run, pictures, "--json")
    assert "is not known" in outcome.err
    assert outcome.json["sizing"]["images"]["train"]["resample"] == "bicubic"


def test_what_contradicts_itself_is_refused(
    vaescale, run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = digits / "val"
    for words, code, said in (
        ((val, "--out", tmp_path / "x.json"), 2, "must end with .csv or .parquet"),
        ((val, "--histograms", tmp_path / "x.png"), 2, "give --odd or --odd-class"),
        ((val, "--odd-class", "7", "--histograms", tmp_path / "x.pdf"), 2, "must end with .png"),
        ((val, "--odd-split", "val"), 2, "is for the images of --odd"),
        ((val, "--odd-class", "ten"), 2, "is no class of the source; its classes are numbers"),
        (("digits", "--odd-class", "ten"), 2, "is no class of the source; its classes are 0, 1"),
        ((val, "--odd-class", "77"), 3, "AUROC needs usual and odd images, and there are 360 and 0"),
        ((val, "--sort", "elbo"), 2, "must be one of neg_elbo_nats"),
        ((val, "--split", "val"), 2, "one set of shards without splits"),
        ((digits, "--split", "test"), 2, "has no split 'test'; it has train, val"),
        (("digits", "--split", "test"), 2, "it has train, val"),
        ((tmp_path / "none",), 2, "is unknown"),
        ((val, "--background", tmp_path), 2, "is not a run folder"),
        ((val, "--limit", 0), 2, "at least 1"),
    ):
        vaescale("score", run, *words).assert_refused(code, said)

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    vaescale("score", run, val, "--out", tmp_path / "x.parquet").assert_refused(2, "pip install pyarrow")
