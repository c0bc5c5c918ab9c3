"""Columns of hub data sets: images, classes as numbers or words over all splits, keys, and what is left out."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.hub_columns import Columns, number_classes
from vaescale.errors import DataError, UserError

INTEGER, TEXT = datasets.Value("int64"), datasets.Value("string")
NAMED = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def picture(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, split: str, columns: dict[str, tuple[Any, list[Any]]], count: int) -> Path:
    """A Parquet file of a split with the column img, and columns of a feature and values."""
    features = {"img": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    rows = {"img": [{"bytes": picture(i), "path": None} for i in range(count)]}
    rows |= {name: values for name, (_, values) in columns.items()}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    pyarrow.parquet.write_table(data.data.table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.parent


def splits_of(argument: str, **options: Any) -> tuple[dict[str, list[tuple[str, int]]], set[tuple[str, ...]]]:
    """Keys and classes of each split, and the names of the classes of all splits."""
    result, names = {}, set()
    for name, listed in open_source(argument, holdout=0, **options).splits.items():
        split = listed()
        names.add(split.class_names)
        result[name] = [(item.key, item.label) for item in split.items]
    return result, names


def labels_of(argument: str, **options: Any) -> dict[str, list[int]]:
    return {name: [label for _, label in items] for name, items in splits_of(argument, **options)[0].items()}


COLUMNS = {
    "numbers": (INTEGER, [0, 2, None], [1, 0], {"train": [0, 2, -1], "test": [1, 0]}, ("0", "1", "2"), "train has no image of 1 of 3 classes (1)"),
    "numbers from one": (INTEGER, [1, 3, -1], [2, 1], {"train": [0, 2, -1], "test": [1, 0]}, ("1", "2", "3"), "3 classes of label, in sorted order: 1, 2, 3"),
    "numbers with gaps": (datasets.Value("float64"), [1.0, float("nan"), 0.0], [1.0, None], {"train": [1, -1, 0], "test": [1, -1]}, ("0", "1"), "1 of 3 images have no class (label)"),
    "words": (TEXT, ["dog", "ant", ""], ["bee", "ant"], {"train": [2, 0, -1], "test": [1, 0]}, ("ant", "bee", "dog"), "1 of 3 images have no class (label)"),
    "named classes": (NAMED, [1, None, 0], [1, 1], {"train": [1, -1, 0], "test": [1, 1]}, ("cat", "dog"), "1 of 3 images have no class (label)"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_classes_are_numbered_over_all_splits(tmp_path: Path, capsys, name: str) -> None:
    feature, train, test, expected, names, said = COLUMNS[name]
    table(tmp_path, "train", {"label": (feature, train)}, 3)
    table(tmp_path, "test", {"label": (feature, test)}, 2)
    splits, found = splits_of(f"hf:{tmp_path}")
    assert {split: [label for _, label in items] for split, items in splits.items()} == expected
    assert found == {names}
    assert [key for key, _ in splits["train"]] == ["000000000", "000000001", "000000002"]
    assert said in capsys.readouterr().err
    assert labels_of(f"hf:{tmp_path}:test") == {"test": expected["test"]}, "one split has the same numbers"


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A data set with two columns of images and of classes, words and a list."""
    columns = {
        "mask": (datasets.Image(), [{"bytes": picture(9), "path": None}] * 2),
        "coarse": (NAMED, [0, 1]),
        "fine": (datasets.ClassLabel(names=list("xyz")), [2, 0]),
        "text": (TEXT, ["a b", "c"]),
        "boxes": (datasets.List(INTEGER), [[1], [2, 3]]),
    }
    return table(tmp_path, "train", columns, 2)


def test_the_first_columns_are_taken_and_the_others_said(several: Path, capsys) -> None:
    assert labels_of(f"hf:{several}") == {"train": [0, 1]}
    said = capsys.readouterr().err
    assert "taken: image=img,label=coarse; left out: mask, fine, text, boxes (choose with --column " in said


CHOSEN = {
    "image=mask,label=fine": ([2, 0], ("x", "y", "z")),
    "label=text": ([0, 1], ("a b", "c")),
    "label=": ([-1, -1], ()),
    "image=img": ([0, 1], ("cat", "dog")),
}


@pytest.mark.parametrize("column", CHOSEN)
def test_columns_can_be_chosen(several: Path, column: str) -> None:
    split = open_source(f"hf:{several}", holdout=0, column=column).splits["train"]()
    items = list(split.items)
    assert ([item.label for item in items], split.class_names) == CHOSEN[column]
    assert (items[0].content == picture(9)) == ("mask" in column)


def test_columns_of_numbers_are_vectors(tmp_path: Path, capsys) -> None:
    columns = {
        "angle": (datasets.Value("float32"), [0.5, None, 2.0]),
        "flags": (datasets.List(INTEGER), [[1, 0], None, [1, 1]]),
        "part": (datasets.List(INTEGER), [[1, 0], [0, 1], []]),
        "long": (datasets.List(INTEGER), [[1, 0], [], [0, 1, 1]]),
        "name": (TEXT, ["a", "b", "c"]),
    }
    folder = table(tmp_path, "train", columns, 3)
    items = list(open_source(f"hf:{folder}", holdout=0, column="vector=flags+angle").splits["train"]().items)
    vectors = [[np.load(io.BytesIO(content)) for _, content in item.members] for item in items]
    np.testing.assert_array_equal(vectors[0], [[1, 0, 0.5]])
    np.testing.assert_array_equal(vectors[2], [[1, 1, 2]])
    assert not vectors[1], "a row without a value has no vector"
    assert "1 of 3 images have no vector (flags, angle)" in capsys.readouterr().err
    for column, fault in (
        ("name", r"row 0: the columns name hold \['a'\], which are not finite numbers"),
        ("part+angle", r"row 1: some of the columns part, angle have no value \(\[\[0, 1\], None\]\)"),
        ("angle+part", "row 1: some of the columns"),
        ("part+flags", "row 1: some of the columns"),
        ("long", "row 2: the columns long hold 3 numbers, and those of rows before 2"),
    ):
        other = open_source(f"hf:{folder}", holdout=0, column=f"vector={column}").splits["train"]()
        with pytest.raises(DataError, match=fault):
            list(other.items)


FAULTS = {
    "vector=angle": r"vector=angle: .* has no such column; its columns are img, mask",
    "label=nothing": r"label=nothing is no column of .*; its columns are img, mask, coarse",
    "label=boxes": r"label=boxes holds no whole numbers or words",
    "image=nothing": r"has no such column; its columns are img",
    "image=text": r"image=text holds no images",
    "picture=img": r"must be image=NAME,label=NAME",
    "mask": r"must be image=NAME,label=NAME",
}


@pytest.mark.parametrize("column", FAULTS)
def test_columns_that_do_not_fit_are_refused(several: Path, column: str) -> None:
    with pytest.raises(UserError, match=FAULTS[column]):
        labels_of(f"hf:{several}", column=column)


def test_columns_of_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--column is for hf:, arrays:, cifar: and bair: sources"):
        open_source(f"folder:{tmp_path}", column="image=x")


def test_bytes_are_images_where_no_other_column_is(tmp_path: Path) -> None:
    rows = pyarrow.table({"jpeg": [picture(1), picture(2)], "label": [0, 1]})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(rows, tmp_path / "data" / "train-00000-of-00001.parquet")
    split = open_source(f"hf:{tmp_path}", holdout=0).splits["train"]()
    assert [(item.content, item.label) for item in split.items] == [(picture(1), 0), (picture(2), 1)]


LABELS = [
    (["dog", "ant"], ["bee"], {"train": [2, 0], "test": [1]}),
    ([2, 0], [0], {"train": [1, 0], "test": [0]}),
]


@pytest.mark.parametrize(("train", "test", "expected"), LABELS)
def test_classes_in_a_file_beside_pictures(tmp_path: Path, train: list, test: list, expected: dict) -> None:
    """metadata.jsonl; metadata.csv gives the same columns, but datasets leaves that file open."""
    for split, values in (("train", train), ("test", test)):
        (tmp_path / split).mkdir()
        for number, _ in enumerate(values):
            (tmp_path / split / f"{number}.png").write_bytes(picture(number))
        lines = [json.dumps({"file_name": f"{i}.png", "label": value}) for i, value in enumerate(values)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert labels_of(f"hf:{tmp_path}") == expected


def test_tars_keep_keys_and_classes(tmp_path: Path) -> None:
    for number in range(2):
        members = {}
        for key in ("a", f"b{number}"):
            members |= {f"x/{key}.png": picture(number), f"x/{key}.cls": b"%d" % (2 * number)}
        tar(tmp_path / f"train-{number}.tar", members)
    splits, names = splits_of(f"hf:{tmp_path}")
    assert splits == {"train": [("x/a", 0), ("x/b0", 0), ("x/a~000000002", 1), ("x/b1", 1)]}
    assert names == {("0", "2")}


def test_classes_in_the_json_of_tars(tmp_path: Path) -> None:
    members = {}
    for key, word in enumerate(("dog", "ant")):
        members |= {f"{key}.png": picture(), f"{key}.json": json.dumps({"label": word, "n": key}).encode()}
    assert splits_of(f"hf:{tar(tmp_path / 'train-0.tar', members)}")[0] == {"train": [("0", 1), ("1", 0)]}


def test_tars_that_datasets_does_not_open_are_indexed_in_place(tmp_path: Path) -> None:
    from vaescale.data.making.indexing import index_shards

    tar(tmp_path / "train-0.tar", {"0.png": picture(), "0.cls": b"dog"})
    with pytest.raises(
        DataError, match=r"cannot be opened: .*; its tars can be indexed in place with .*--index-only"
    ):
        labels_of(f"hf:{tmp_path}")
    assert index_shards(tmp_path).shards.class_names == ("dog",)


def test_values_that_are_no_classes_are_refused() -> None:
    columns = Columns("img", "label")
    with pytest.raises(DataError, match="column label holds float, not numbers or words"):
        number_classes("hf:x", {"train": lambda: iter([1.5])}, columns)
    with pytest.raises(DataError, match="more than 100000 different values"):
        number_classes("hf:x", {"train": lambda: iter(range(100_002))}, columns)
    numbering = number_classes("hf:x", {"train": lambda: iter(["b", "a"])}, columns)
    with pytest.raises(DataError, match="class 'c' was not there at the first reading"):
        numbering.number("c")
