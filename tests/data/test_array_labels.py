"""Labels of arrays are classes, or it is said why they are none; --column chooses among arrays."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_arrays import LABELS, RGB, assert_holds, items_of
from vaescale.commands.make_shards import make_shards
from vaescale.errors import DataError, UserError


@pytest.mark.parametrize(
    ("labels", "classes", "sentence"),
    [
        (np.eye(4)[LABELS], LABELS, "column with the 1"),
        (np.eye(4, dtype=np.uint8)[LABELS] | 1, -1, "several values for each image; --column label=labels.0"),
        (LABELS / 3.0, -1, "no whole numbers"),
        (np.where(LABELS == 0, np.inf, LABELS), -1, "no whole numbers"),
        (np.where(LABELS == 3, np.nan, LABELS), np.where(LABELS == 3, -1, LABELS), ""),
        (LABELS.astype(np.float32), LABELS, ""),
        (LABELS[None] + 5, LABELS, "in sorted order: 5, 6, 7, 8"),
        (
            np.array(["d", "b", "c", "a"])[LABELS],
            3 - np.array([0, 2, 1, 3])[LABELS],
            "in sorted order: a, b, c, d",
        ),
        (np.where(LABELS == 3, -1, LABELS), np.where(LABELS == 3, -1, LABELS), ""),
        (RGB, -1, "one number or word for each image"),
    ],
)
def test_labels_are_classes_or_said(
    labels: np.ndarray, classes: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", images=RGB, labels=labels)
    assert_holds(items_of(f"arrays:{tmp_path}/a.npz")["train"], RGB, classes)
    assert sentence in capsys.readouterr().err


def test_a_key_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=RGB, arr_1=RGB[::-1], train_kind=LABELS, other=np.zeros(3))
    with pytest.raises(
        DataError, match=r"2 arrays may be the images of train.*choose with --column image=arr_0"
    ):
        items_of(f"arrays:{path}")
    assert_holds(items_of(f"arrays:{path}", column="image=arr_1,label=kind")["train"], RGB[::-1], LABELS)
    assert "arrays taken: image=arr_1,label=train_kind; left out: arr_0 uint8" in capsys.readouterr().err
    assert_holds(items_of(f"arrays:{path}", column="image=arr_0,label=")["train"], RGB)
    for column in ("image=arr_2", "label=arr_2"):
        with pytest.raises(UserError, match="no such array; it holds arr_0 uint8"):
            items_of(f"arrays:{path}", column=f"image=arr_0,{column}" if column[0] == "l" else column)


def test_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=RGB, labels=LABELS[:9])
    with pytest.raises(DataError, match=r"9 labels for 12 images; .*--column label="):
        items_of(f"arrays:{tmp_path}/a.npz")
    assert_holds(items_of(f"arrays:{tmp_path}/a.npz", column="label=")["train"], RGB)


def test_an_array_of_numbers_is_the_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.npz"
    latents = np.stack([LABELS / 3, -LABELS], axis=1)
    latents[5] = np.nan
    np.savez(path, images=RGB, labels=LABELS, latents_values=latents, odd=np.zeros(3))
    items = items_of(f"arrays:{path}", column="vector=latents_values")["train"]
    assert [bool(item.members) for item in items] == [row != 5 for row in range(len(LABELS))]
    name, content = items[3].members[0]
    assert name == "vector.npy"
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), latents[3].astype(np.float32))
    assert [item.label for item in items] == LABELS.tolist()
    said = capsys.readouterr().err
    assert "1 of 12 images have no vector" in said
    assert "left out: odd" in said
    latents[4, 1] = np.inf
    np.savez(path, images=RGB, latents=latents, odd=np.zeros(3), name=np.array(["a"] * 12))
    for key, fault in (
        ("latents", "has 1 rows with NaN"),
        ("odd", "3 rows for 12 images"),
        ("name", "must hold numbers"),
    ):
        with pytest.raises(UserError, match=rf"--column vector={key}: .*{fault}"):
            items_of(f"arrays:{path}", column=f"vector={key}")
    with pytest.raises(UserError, match="no such array; it holds images"):
        items_of(f"arrays:{path}", column="vector=angles")


def test_two_vectors_of_an_image_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=RGB, angle=LABELS)
    (tmp_path / "t.csv").write_text("\n".join(f"{row:06d},1" for row in range(12)))
    with pytest.raises(UserError, match="has a vector of its source already"):
        make_shards(
            f"arrays:{tmp_path}/a.npz",
            tmp_path / "out",
            column="vector=angle",
            vectors=tmp_path / "t.csv",
            holdout=0,
        )
