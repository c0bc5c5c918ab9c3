"""Folders of images as people have them: what is a split, what is a class, and one number for a class in all splits."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.data.making.sources import open_source
from vaescale.errors import DataError, UserError


def picture(path: Path, *, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(path)


def fill(folder: Path, *names: str) -> None:
    """Three images in each folder."""
    for name in names:
        for number in range(3):
            picture(folder / name / f"{name.rpartition('/')[2]}{number}.png")


def listed(argument: str, **options: object) -> dict[str, dict[str, int]]:
    """Class numbers by key, by split; the names of all splits are the same."""
    source = open_source(argument, holdout=0, **options)
    splits = {name: split() for name, split in source.splits.items()}
    assert len({split.class_names for split in splits.values()}) == 1
    return {name: {item.key: item.label for item in split.items} for name, split in splits.items()}


def names(argument: str, **options: object) -> tuple[str, ...]:
    source = open_source(argument, holdout=0, **options)
    return next(iter(source.splits.values()))().class_names


def test_a_class_has_one_number_in_all_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "train/ant", "train/bee", "train/cat", "val/ant", "val/cat", "test")
    splits = listed(f"folder:{tmp_path}")
    assert names(f"folder:{tmp_path}") == ("ant", "bee", "cat")
    assert splits["train"]["cat/cat0"] == splits["val"]["cat/cat0"] == 2
    assert set(splits["test"].values()) == {-1}
    said = capsys.readouterr().err
    assert "val has no image of 1 of 3 classes (bee)" in said
    assert "test has no classes (ant, bee, cat)" in said


def test_a_split_of_one_class_that_others_know_keeps_it(tmp_path: Path) -> None:
    fill(tmp_path, "train/ant", "train/bee", "val/bee")
    assert set(listed(f"folder:{tmp_path}")["val"].values()) == {1}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "dev", "test"),
        ("train", "eval", "Testing"),
        ("train", "valid", "TEST"),
    ],
)
def test_the_usual_names_of_splits_in_any_case(tmp_path: Path, train: str, val: str, test: str) -> None:
    fill(tmp_path, *(f"{split}/{name}" for split in (train, val, test) for name in ("ant", "bee")))
    splits = listed(f"folder:{tmp_path}")
    assert splits.keys() == {"train", "val", "test"}
    assert all(len(split) == 6 for split in splits.values())


def test_an_ambiguous_folder_names_the_ways_out_which_work(tmp_path: Path) -> None:
    fill(tmp_path / "a", "bus", "car", "test")
    with pytest.raises(
        DataError, match=r"test and also bus, car; .*--splits test=test,train=DIR.*--classes-only"
    ):
        open_source(f"folder:{tmp_path}/a")
    assert names(f"folder:{tmp_path}/a", classes_only=True) == ("bus", "car", "test")
    assert listed(f"folder:{tmp_path}/a", splits="test=test,train=bus").keys() == {"train", "test"}
    fill(tmp_path / "b", "train/ant", "train/bee", "valid/ant", "val/bee")
    with pytest.raises(DataError, match=r"val and valid, .*--splits train=train,val=val"):
        open_source(f"folder:{tmp_path}/b")
    assert listed(f"folder:{tmp_path}/b", splits="train=train,val=val")["val"] == {
        "bee/bee0": 1,
        "bee/bee1": 1,
        "bee/bee2": 1,
    }


def test_a_split_within_another_one_is_not_in_it(tmp_path: Path) -> None:
    fill(tmp_path, "bus", "car", "test")
    splits = listed(f"folder:{tmp_path}", splits="test=test,train=.")
    assert sorted(splits["train"]) == [
        f"{name}/{name}{number}" for name in ("bus", "car") for number in range(3)
    ]
    assert names(f"folder:{tmp_path}", splits="test=test,train=.") == ("bus", "car")
    with pytest.raises(UserError, match=r"names \./test twice"):
        open_source(f"folder:{tmp_path}", splits="test=test,train=./test")


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ("train=../x", "must be a folder below"),
        ("train=/etc", "must be a folder below"),
        ("night=a", "must be like train=DIR"),
        ("train", "must be like train=DIR"),
        ("train=none", "none is not a folder"),
    ],
)
def test_folders_of_splits_that_do_not_fit_are_refused(tmp_path: Path, splits: str, words: str) -> None:
    fill(tmp_path, "a")
    with pytest.raises(UserError, match=words):
        open_source(f"folder:{tmp_path}", splits=splits)
    with pytest.raises(UserError, match="contradict"):
        open_source(f"folder:{tmp_path}", splits="train=a", classes_only=True)
    with pytest.raises(UserError, match="--splits is for folder: sources"):
        open_source("digits", splits="train=a")


def test_train_is_cut_only_where_it_is_alone(tmp_path: Path) -> None:
    fill(tmp_path / "alone", "ant", "bee")
    assert open_source(f"folder:{tmp_path}/alone").held_out == 0.05
    fill(tmp_path / "tested", "train/ant", "train/bee", "test/ant", "test/bee")
    source = open_source(f"folder:{tmp_path}/tested")
    assert source.splits.keys() == {"train", "test"}
    assert source.splits["train"]().number == 6
    cut = open_source(f"folder:{tmp_path}/tested", holdout=0.5)
    assert cut.splits.keys() == {"train", "test", "val"}


def test_one_folder_more_a_lone_folder_and_junk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "a", "set/train/ant", "set/train/bee", "set/@eaDir", "set/train/bee/.ipynb_checkpoints")
    assert names(f"folder:{tmp_path}/a") == ("ant", "bee")
    assert len(listed(f"folder:{tmp_path}/a")["train"]) == 6
    said = capsys.readouterr().err
    assert "the images are read from" in said
    assert "left out: @eaDir" in said
    assert "1 folders .ipynb_checkpoints" in said
    fill(tmp_path / "b", "photos")
    assert names(f"folder:{tmp_path}/b") == ()
    assert "photos, which is no class" in capsys.readouterr().err


def test_a_folder_of_the_system_that_cannot_be_read_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path, "train/ant", "train/bee", "lost+found")
    scandir = os.scandir

    def refused(path: Path) -> object:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert len(listed(f"folder:{tmp_path}")["train"]) == 6
    (tmp_path / "lost+found").rename(tmp_path / "train" / "lost+found")
    assert len(listed(f"folder:{tmp_path}")["train"]) == 6
    monkeypatch.setattr(
        os, "scandir", lambda path: refused(path.with_name("lost+found") if path.name == "bee" else path)
    )
    with pytest.raises(DataError, match=r"lost\+found cannot be read: Permission denied"):
        listed(f"folder:{tmp_path}")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet's layout."""
    for number in range(4):
        for wnid in ("n01443537", "n01629819"):
            picture(tmp_path / f"train/{wnid}/images/{wnid}_{number}.JPEG")
        picture(tmp_path / f"val/images/val_{number}.JPEG")
        picture(tmp_path / f"test/images/test_{number}.JPEG")
    rows = [
        f"val_{number}.JPEG\t{('n01443537', 'n01629819')[number % 2]}\t0\t0\t62\t57\n" for number in range(4)
    ]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_tiny_imagenet(tiny: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    splits = listed(f"{kind}:{tiny}")
    assert names(f"{kind}:{tiny}") == ("n01443537", "n01629819")
    assert sorted(splits["train"].values()) == [0] * 4 + [1] * 4
    assert {key.rpartition("/")[2]: label for key, label in splits["val"].items()} == {
        f"val_{number}": number % 2 for number in range(4)
    }
    assert list(splits["test"].values()) == [-1] * 4
    rows = (tiny / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)
    (tiny / "val" / "val_annotations.txt").write_text("".join(rows[1:]))
    assert sorted(listed(f"{kind}:{tiny}")["val"].values()) == [-1, 0, 1, 1]
    assert "1 of 4 images of val have no class" in capsys.readouterr().err
    (tiny / "val" / "val_annotations.txt").unlink()
    assert set(listed(f"{kind}:{tiny}")["val"].values()) == {-1}


def test_wnid_folders_without_images_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "train" / "n01443537").mkdir(parents=True)
    with pytest.raises(DataError, match="wnid folders hold no images"):
        open_source(f"imagenet:{tmp_path}").splits["train"]()


@pytest.mark.parametrize("given", [".", "Img", "Img/img_align_celeba"])
def test_celeba_as_it_is_published(tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        picture(tmp_path / "set" / "Img" / "img_align_celeba" / f"{number:06d}.jpg", size=(178, 218))
    (tmp_path / "set" / "Eval").mkdir()
    (tmp_path / "set" / "Eval" / "list_eval_partition.txt").write_text(
        "".join(f"{number:06d}.jpg {number % 3}\n" for number in range(4))
    )
    splits = listed(f"celeba:{tmp_path}/set/{given}")
    assert {name: sorted(split) for name, split in splits.items()} == {
        "train": ["000000", "000003"],
        "val": ["000001"],
        "test": ["000002"],
    }
    assert "1 of 5 images" in capsys.readouterr().err
    assert listed(f"celeba:{tmp_path}") == splits, "one folder more"


def test_what_is_not_unpacked_is_named(tmp_path: Path) -> None:
    (tmp_path / "Img").mkdir()
    (tmp_path / "Img" / "img_celeba.7z.001").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack .*img_celeba\.7z\.001 first"):
        open_source(f"celeba:{tmp_path}")
    (tmp_path / "Img" / "img_celeba.7z.001").rename(tmp_path / "Img" / "faces.7z")
    with pytest.raises(DataError, match=r"unpack its \.7z files"):
        open_source(f"folder:{tmp_path}").splits["train"]()


def test_idx_files_further_below_are_named(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"")
    for kind in ("idx", "folder"):
        with pytest.raises(DataError, match=r"did you mean idx:.*MNIST/raw\?"):
            open_source(f"{kind}:{tmp_path}").splits["train"]()


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    stored = np.zeros((2, 4, 4))
    stored[:, 0, 3] = 9
    for name, row, column in (("emnist-letters-train", 3, 0), ("train", 0, 3)):
        folder = tmp_path / name
        folder.mkdir()
        write_idx(folder / f"{name}-images-idx3-ubyte", stored)
        (item, _) = open_source(f"idx:{folder}", holdout=0).splits["train"]().items
        assert item.content[row, column, 0] == 9, name
        assert item.content.flags.c_contiguous, "or it would be written as no image that shards hold"
        assert item.content.sum() == 9


def test_labels_of_idx_files_are_numbered_in_order_over_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """EMNIST's letters are 1 to 26; a small test set may lack the last one."""
    for prefix, labels in (("train", [1, 2, 3, 3]), ("t10k", [1, 3])):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((len(labels), 4, 4)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.array(labels))
    splits = listed(f"idx:{tmp_path}")
    assert names(f"idx:{tmp_path}") == ("1", "2", "3")
    assert list(splits["train"].values()) == [0, 1, 2, 2]
    assert list(splits["test"].values()) == [0, 2]
    assert "test has no image of 1 of 3 classes (2)" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_counts_all(vaescale, tmp_path: Path) -> None:
    fill(tmp_path / "in", "train/ant", "train/bee", "test/ant")
    picture(tmp_path / "in" / "train" / "ant" / "large.png", size=(9, 5))
    (tmp_path / "in" / "train" / "bee" / "empty.png").write_bytes(b"")
    outcome = vaescale("make-shards", f"folder:{tmp_path}/in", tmp_path / "out", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out").exists()
    train = outcome.json["train"]
    assert (train["images"], train["classes"], train["without_class"]) == (7, {"ant": 4, "bee": 3}, 0)
    assert train["shapes"] == {"4x4x3 png": 6, "5x9x3 png": 1}
    (fault,) = train["passed_over"].values()
    assert fault["images"] == 1
    assert "empty.png" in fault["first"]
    assert outcome.json["test"]["classes"] == {"ant": 3, "bee": 0}
    shown = vaescale("make-shards", f"folder:{tmp_path}/in", tmp_path / "out", "--dry-run", "--limit", 2).out
    assert "train: 2 images" in shown


def test_what_a_crop_leaves_out_is_said_and_whole_keeps_it(vaescale, tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", size=(96, 48) if number else (50, 49))
    words = ("make-shards", f"folder:{tmp_path}/in", tmp_path / "out", "--holdout", 0, "--size", 48)
    looked = vaescale(*words, "--dry-run").out
    said = vaescale(*words).err
    assert "leaves out 50% of their pixels" in looked
    assert "3 of 4 images are cut to the aspect of --size, which leaves out 50% of their pixels" in said
    words = (*words[:2], tmp_path / "whole", *words[3:], "--crop", "whole")
    assert "are cut to" not in vaescale(*words).err
