"""Vectors of images: written from tables, read from members beside their images, and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Outcome
from vaescale.commands.make_shards import make_shards
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig, VectorMember
from vaescale.data.making.items import Item, members_of
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.mixed_reader import MixedReader
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.vectors import refuse_other_vectors
from vaescale.errors import DataError

Items = Callable[..., list[Item]]
VECTORS = np.random.Generator(np.random.Philox(key=3)).normal(size=(25, 3)).astype(np.float32)


def opened(folder: Path, vectors: VectorMember, **changes: Any) -> ShardReader:
    values = {"train": str(folder), "val": str(folder), "image_size": 8, "global_batch": 4, "workers": 0}
    return open_reader(str(folder), DataConfig.model_validate({**values, **changes}).with_vectors(vectors))


def with_json(items: list[Item], values: list[Any]) -> list[Item]:
    return [
        item._replace(members=(("json", json.dumps(value).encode()),))
        for item, value in zip(items, values, strict=True)
    ]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_images_come_with_their_vectors(tmp_path: Path, make_items: Items, cache: str) -> None:
    items = [item._replace(members=members_of(VECTORS, n)) for n, item in enumerate(make_items(25))]
    write_shards(items, tmp_path / "npy", Making(shard_samples=10))
    write_shards(
        with_json(make_items(25), [{"x": row.tolist(), "n": n} for n, row in enumerate(VECTORS)]),
        tmp_path / "json",
        Making(shard_samples=10),
    )
    wanted = VectorMember("vector.npy", 3)
    reader = opened(tmp_path / "npy", wanted, cache=cache)
    numbers = np.array([24, 3, 11, 3])
    fetched = reader.__getitems__(Request(numbers))
    assert fetched.vectors is not None
    assert np.array_equal(fetched.vectors.numpy(), VECTORS[numbers])
    moments = refuse_other_vectors(reader, wanted)
    np.testing.assert_allclose(moments.mean, VECTORS.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.deviation, VECTORS.std(0), rtol=1e-5)

    other = opened(tmp_path / "json", VectorMember("json:x", 3), cache=cache)
    mixed = MixedReader([reader, other]).__getitems__(Request(np.array([2, 27, 49])))
    assert mixed.vectors is not None
    assert np.array_equal(mixed.vectors.numpy(), VECTORS[[2, 2, 24]])
    alone = opened(tmp_path / "json", VectorMember("json:n", 1)).__getitems__(Request(np.array([7])))
    assert alone.vectors is not None
    assert alone.vectors.tolist() == [[7.0]]


def test_what_is_no_vector_is_counted_by_kind(tmp_path: Path, make_items: Items) -> None:
    values: list[Any] = [{"x": [1, 2]}] * 20 + [
        {"y": [1, 2]},
        {"x": [1]},
        {"x": ["a", 2]},
        {"x": [1, float("nan")]},
        {"x": [1, 1e300]},
    ]
    write_shards(with_json(make_items(25), values), tmp_path / "some", Making(shard_samples=10))
    wanted = VectorMember("json:x", 2)
    reader = opened(tmp_path / "some", wanted)
    with pytest.raises(DataError) as fault:
        refuse_other_vectors(reader, wanted)
    for words in (
        "1 have none (a JSON file has y)",
        "1 have another size (1 values)",
        "1 are no vectors (JSON values that are not numbers)",
        "2 hold NaN or infinite values (such as",
        "each of the 25 images",
    ):
        assert words in str(fault.value)
    with pytest.raises(DataError, match="have another size") as fault:
        refuse_other_vectors(reader, wanted, may_miss=True)
    assert "have none" not in str(fault.value)


@pytest.fixture
def pictures(tmp_path: Path, make_items: Items) -> Path:
    """A folder of two classes, a/0.npy to b/5.npy."""
    for number, item in enumerate(make_items(6)):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, item.content)
    return tmp_path / "pictures"


@pytest.mark.parametrize("kind", ["csv", "celeba"])
def test_a_table_gives_each_image_its_vector(
    pictures: Path, tmp_path: Path, vaescale: Callable[..., Outcome], kind: str
) -> None:
    rows = [(f"{n}.npy" if kind == "celeba" else f"{'ab'[n % 2]}/{n}.npy", n, -n) for n in range(6)]
    if kind == "csv":
        text = "name,up,down\n" + "\n".join(",".join(map(str, row)) for row in rows)
    else:
        text = "6\nUp  Down\n" + "\n".join("  ".join(map(str, row)) for row in rows)
    (tmp_path / "table").write_text(text)
    words = ("make-shards", f"folder:{pictures}", tmp_path / "out", "--vectors", tmp_path / "table")
    assert vaescale(*words, "--holdout", 0).code == 0
    reader = opened(tmp_path / "out/train", VectorMember("vector.npy", 2))
    assert [name.lower() for name in reader.index.made["vectors"]["columns"]] == ["up", "down"]
    fetched = reader.__getitems__(Request(np.arange(6)))
    numbers = [float(key.rpartition("/")[2]) for key in fetched.keys]
    assert fetched.vectors is not None
    assert fetched.vectors.tolist() == [[n, -n] for n in numbers]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0,1\n1,1\n2,1\n3,1\n4,1\n", "image b/5 of train has no row"),
        ("0,1\n1,1\n2,1\n3,x\n4,1\n5,1\n", "1 of 6 rows are not a name and 1 finite numbers, such as '3,x'"),
        ("0,1,nan\n1,1,1\n", "1 of 2 rows are not a name and 2 finite numbers, such as '0,1,nan'"),
        ("0,inf\n1,1\n", "1 of 2 rows are not a name and 1 finite numbers, such as '0,inf'"),
        ("0,1\n1,1\n2,1\n3,1\n4,1\n4,1\n5,1\n", "1 of 7 names occur twice"),
        ("", "has no rows of a name and numbers"),
    ],
)
def test_another_table_is_refused(
    pictures: Path, tmp_path: Path, vaescale: Callable[..., Outcome], text: str, sentence: str
) -> None:
    (tmp_path / "table.csv").write_text(text)
    words = ("make-shards", f"folder:{pictures}", tmp_path / "out", "--vectors", tmp_path / "table.csv")
    vaescale(*words, "--holdout", 0).assert_refused(3, sentence)


def test_two_images_of_one_name_need_their_folders(
    pictures: Path, tmp_path: Path, vaescale: Callable[..., Outcome]
) -> None:
    (pictures / "a/1.npy").write_bytes((pictures / "b/1.npy").read_bytes())
    (tmp_path / "table.csv").write_text("".join(f"{n},1\n" for n in range(6)))
    words = ("make-shards", f"folder:{pictures}", tmp_path / "out", "--vectors", tmp_path / "table.csv")
    vaescale(*words, "--holdout", 0).assert_refused(
        3, "has one row for image", "name them SPLIT/NAME, such as train/"
    )


def test_held_out_images_have_the_rows_of_train_and_nan_is_no_vector(
    pictures: Path, tmp_path: Path, vaescale: Callable[..., Outcome]
) -> None:
    rows = [f"train/{'ab'[n % 2]}/{n}.npy,{n if n else 'nan'}" for n in range(6)]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    words = ("make-shards", f"folder:{pictures}", tmp_path / "out", "--vectors", tmp_path / "table.csv")
    made = vaescale(*words, "--holdout", 0.4)
    assert made.code == 0, made.err
    assert "1 of 6 images have no vector, as their rows are nan" in made.err
    given = {}
    for split in ("train", "val"):
        reader = opened(tmp_path / "out" / split, VectorMember("vector.npy", 1))
        fetched = reader.__getitems__(Request(np.arange(len(reader))))
        assert fetched.vectors is not None
        given |= dict(zip(fetched.keys, fetched.vectors[:, 0].tolist(), strict=True))
    assert len(given) == 6
    for key, number in given.items():
        np.testing.assert_equal(number, float(key[-1]) or np.nan)


def test_a_row_that_is_missing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "t.csv").write_text("".join(f"train/{n:06d},1\n" for n in range(3)) + "test/000000,1\n")
    with pytest.raises(DataError, match="image 000001 of test has no row in"):
        make_shards(f"arrays:{tmp_path}/a.npz", tmp_path / "out", vectors=tmp_path / "t.csv")
    assert not (tmp_path / "out").exists()
