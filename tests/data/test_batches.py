"""CIFAR and the down-sampled ImageNet as they are published: rows of pixels and labels, binary, pickled or .npz."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_arrays import assert_holds, items_of
from vaescale.data.making.sources import stored
from vaescale.errors import DataError, UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
ROWS = IMAGES.transpose(0, 3, 1, 2).reshape(12, -1)  # red, green and blue after each other
NAMES = [f"class{number}" for number in range(10)]


def python_10(folder: Path, protocol: int = 2, **changes: Any) -> Path:
    """CIFAR-10's Python version: two images in each batch of train, two in test."""
    folder.mkdir(parents=True)
    for number in range(6):
        part = slice(2 * number, 2 * number + 2)
        content = {
            "batch_label": "a batch",
            "labels": [number, 9 - number],
            "data": ROWS[part],
            "filenames": ["a.png", "b.png"],
            **changes,
        }
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES, "num_vis": 3072}, protocol))
    return folder


def binary_10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(6):
        labels = np.array([[number], [9 - number]], np.uint8)
        rows = np.concatenate([labels, ROWS[2 * number : 2 * number + 2]], axis=1)
        rows.tofile(folder / (f"data_batch_{number + 1}.bin" if number < 5 else "test_batch.bin"))
    (folder / "batches.meta.txt").write_text("\n".join([*NAMES, ""]))
    return folder


def python_100(folder: Path, protocol: int = 2) -> Path:
    folder.mkdir(parents=True)
    for name, part in {"train": slice(0, 10), "test": slice(10, 12)}.items():
        fine = [(37 * number) % 100 for number in range(12)][part]
        content = {"fine_labels": fine, "coarse_labels": [label // 5 for label in fine], "data": ROWS[part]}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    meta = {
        "fine_label_names": [f"fine{number}" for number in range(100)],
        "coarse_label_names": [f"coarse{number}" for number in range(20)],
    }
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol))
    return folder


def binary_100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    fine = np.array([(37 * number) % 100 for number in range(12)], np.uint8)[:, None]
    rows = np.concatenate([fine // 5, fine, ROWS], axis=1)
    rows[:10].tofile(folder / "train.bin")
    rows[10:].tofile(folder / "test.bin")
    for name, number in (("fine", 100), ("coarse", 20)):
        (folder / f"{name}_label_names.txt").write_text("\n".join(f"{name}{each}" for each in range(number)))
    return folder


def class_names(word: str, **options: Any) -> tuple[str, ...]:
    from vaescale.data.making.sources import open_source

    return open_source(word, **options).splits["train"]().class_names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "binary"])
def test_cifar_10(protocol: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 5000)  # one image in each block
    folder = tmp_path / "above" / "cifar-10"
    binary_10(folder) if protocol == "binary" else python_10(folder, protocol)
    labels = [label for number in range(6) for label in (number, 9 - number)]
    for given in (folder, folder.parent):
        splits = items_of(f"cifar:{given}")
        assert list(splits) == ["train", "test"]
        assert_holds(splits["train"], IMAGES[:10], labels[:10])
        assert_holds(splits["test"], IMAGES[10:], labels[10:])
        assert class_names(f"cifar:{given}") == tuple(NAMES)


@pytest.mark.parametrize("write", [python_100, binary_100])
def test_cifar_100(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "cifar-100")
    fine = np.array([(37 * number) % 100 for number in range(12)])
    splits = items_of(f"cifar:{folder}")
    assert_holds(splits["train"], IMAGES[:10], fine[:10])
    assert_holds(splits["test"], IMAGES[10:], fine[10:])
    assert "left out: coarse_labels (choose with --column label=coarse_labels)" in capsys.readouterr().err
    coarse = items_of(f"cifar:{folder}", column="label=coarse_labels")
    assert_holds(coarse["train"], IMAGES[:10], fine[:10] // 5)
    assert class_names(f"cifar:{folder}", column="label=coarse_labels")[3] == "coarse3"
    assert class_names(f"cifar:{folder}")[37] == "fine37"
    assert_holds(items_of(f"cifar:{folder}", column="label=")["train"], IMAGES[:10])
    for column in ("label=colour", "image=data"):
        with pytest.raises(UserError, match="CIFAR has label=coarse_labels or label=fine_labels"):
            items_of(f"cifar:{folder}", column=column)


def test_cifar_without_names_has_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = python_10(tmp_path / "a")
    (folder / "batches.meta").unlink()
    (folder / "data_batch_2").unlink()
    assert class_names(f"cifar:{folder}") == tuple("0123456789")
    assert "train has 4 of 5 batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": ROWS[:2, :-3]}, r"uint8 \[2, 3069\], not uint8 \[N, 3\*S\*S\]"),
        ({"data": ROWS[:2].astype(np.int32)}, r"int32 \[2, 3072\], not uint8"),
        ({"data": [1, 2]}, "holds no array `data`, but batch_label, labels"),
        ({"labels": [1]}, "2 images and 1 labels; fetch it again"),
        ({"labels": [1, "a"]}, "holds no whole numbers `labels`"),
        ({"labels": [1, -1]}, "holds no whole numbers `labels`"),
        ({"labels": [1, 10]}, "label 10 for 10 classes; fetch its files again"),
        ({"labels": {1, 2}}, "is a pickle that holds"),
    ],
)
def test_batches_of_another_form_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    python_10(tmp_path / "a", 4, **changes)
    with pytest.raises(DataError, match=sentence):
        items_of(f"cifar:{tmp_path}/a")


def test_the_remedy_for_a_pickle_of_other_objects_works(tmp_path: Path) -> None:
    folder = python_10(tmp_path / "a", 4, filenames={"a.png"})
    with pytest.raises(
        DataError, match=r"data_batch_1 is a pickle that holds a set; .*numpy\.savez.*arrays:FILE\.npz"
    ):
        items_of(f"cifar:{folder}")
    np.savez(tmp_path / "mine.npz", images=ROWS[:2].reshape(2, 3, 32, 32), labels=[0, 9])
    assert_holds(items_of(f"arrays:{tmp_path}/mine.npz")["train"], IMAGES[:2], [0, 1])


def test_cut_binary_batches_are_refused(tmp_path: Path) -> None:
    folder = binary_10(tmp_path / "a")
    with (folder / "data_batch_3.bin").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=r"data_batch_3\.bin has 5000 bytes, which are no whole rows of 3073"):
        items_of(f"cifar:{folder}")


def imagenet(folder: Path, form: str, *, side: int = 8, batches: int = 10) -> np.ndarray:
    """Batches of two images each, and val of three. Returns all images."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(1).integers(0, 256, (2 * batches + 3, side, side, 3), dtype=np.uint8)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for number in range(batches + 1):
        part = slice(2 * number, 2 * number + (2 if number < batches else 3))
        labels = [1 + (99 * each) % 1000 for each in range(len(images))][part]
        content = {"data": rows[part], "labels": labels, "mean": rows.mean(axis=0)}
        name = f"train_data_batch_{number + 1}" if number < batches else "val_data"
        if form == "npz":
            np.savez(folder / f"{name}.npz", **content)
        else:
            (folder / name).write_bytes(pickle.dumps(content, 2 if form == "2" else 5))
    return images


@pytest.mark.parametrize("form", ["npz", "2", "5"])
def test_down_sampled_imagenet(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The batches in their order, 10 after 9, and labels from 1 on. Chrabaszcz et al. 2017."""
    images = imagenet(tmp_path / "Imagenet8", form)
    labels = [(99 * each) % 1000 for each in range(23)]
    for given in (tmp_path, tmp_path / "Imagenet8"):
        splits = items_of(f"imagenet:{given}")
        assert list(splits) == ["train", "val"]
        assert_holds(splits["train"], images[:20], labels[:20])
        assert_holds(splits["val"], images[20:], labels[20:])
    assert "they are not in the order of the wnids" in capsys.readouterr().err
    assert class_names(f"imagenet:{tmp_path}")[999] == "1000"
    names = "".join(f"n{10**7 + 7 * each % 1000} {each} name\n" for each in range(1, 1001))
    (tmp_path / "map_clsloc.txt").write_text(names)
    assert class_names(f"imagenet:{tmp_path}/Imagenet8")[1] == "n10000014"
    (tmp_path / "map_clsloc.txt").write_text(names[:300])
    with pytest.raises(DataError, match=r"map_clsloc\.txt does not name the classes 1 to 1000"):
        items_of(f"imagenet:{tmp_path}")


def test_two_sizes_of_imagenet_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet(tmp_path / "a" / "8", "5", batches=2)
    imagenet(tmp_path / "a" / "16", "npz", side=16, batches=2)
    with pytest.raises(DataError, match=r"several sets of train.*give one folder"):
        items_of(f"imagenet:{tmp_path}/a")
    assert len(items_of(f"imagenet:{tmp_path}/a/16")["train"]) == 4
    assert "train has 2 of 10 batches" in capsys.readouterr().err


def test_labels_of_imagenet_outside_1_to_1000_are_refused(tmp_path: Path) -> None:
    content = {"data": ROWS[:2], "labels": [0, 5]}
    (tmp_path / "val_data").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match="labels that are not from 1 to 1000"):
        items_of(f"imagenet:{tmp_path}")
