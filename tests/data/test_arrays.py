"""Images in array files: every layout, container and range of values gives the same images, or one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from vaescale.data.making.items import Item
from vaescale.data.making.sources import array_images, array_names, open_source, stored
from vaescale.data.pictures import decode
from vaescale.data.tars import samples
from vaescale.errors import DataError, UserError

# Images of noise: no two are alike, nor is one when it is turned or its channels are exchanged.
RGB = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
GREY = RGB[..., :1]
LABELS = np.arange(12) % 4


def items_of(word: str, **options: Any) -> dict[str, list[Item]]:
    """The items of each split; the outline says the same of them, without images."""
    result = {}
    for name, split in open_source(word, holdout=0, **options).splits.items():
        listed = split()
        items = list(listed.items)
        assert listed.outline is not None
        outline = list(listed.outline())
        assert listed.number == len(items)
        assert [(one.key, one.label, one.content.shape) for one in items] == [
            (one.key, one.label, one.content.shape) for one in outline
        ]
        assert all(one.content.dtype == np.uint8 and one.content.flags.c_contiguous for one in items)
        result[name] = items
    return result


def assert_holds(items: list[Item], images: np.ndarray, labels: Any = -1) -> None:
    assert np.array_equal(np.stack([one.content for one in items]), images)
    assert np.array_equal([one.label for one in items], np.broadcast_to(labels, len(images)))


def test_keys_tell_splits_images_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, keys in enumerate(
        [
            ("train_images", "train_labels", "test_images", "test_labels"),
            ("x_train", "y_train", "x_test", "y_test"),
            ("trainX", "trainY", "testX", "testY"),
        ]
    ):
        values = (RGB[:8], LABELS[:8, None], RGB[8:], LABELS[8:, None])
        path = tmp_path / f"set{number}.npz"
        np.savez(path, **dict(zip(keys, values, strict=True)))
        splits = items_of(f"arrays:{path}")
        assert list(splits) == ["train", "test"]
        assert_holds(splits["train"], RGB[:8], LABELS[:8])
        assert_holds(splits["test"], RGB[8:], LABELS[8:])
    assert "left out" not in capsys.readouterr().err


def test_file_and_folder_names_tell_splits_and_parts(tmp_path: Path) -> None:
    for name, part in {"a_train_0": slice(0, 4), "a_train_1": slice(4, 8), "a_valid": slice(8, 12)}.items():
        np.savez(tmp_path / f"{name}.npz", images=RGB[part], labels=LABELS[part])
    (tmp_path / "Test").mkdir()
    np.savez(tmp_path / "Test" / "of_eval.npz", images=RGB[:3])
    splits = items_of(f"arrays:{tmp_path}")
    assert list(splits) == ["train", "val", "test"]
    assert_holds(splits["train"], RGB[:8], LABELS[:8])
    assert_holds(splits["val"], RGB[8:], LABELS[8:])
    assert_holds(splits["test"], RGB[:3])


def test_svhn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[H, W, C, N], and the label 10 is the digit 0. Netzer et al. 2011."""
    labels = np.array([[10], [1], [9], [10], [2], [3], [4], [5], [6], [7], [8], [1]], np.uint8)
    for number, name in enumerate(("train", "test", "extra")):
        savemat(
            tmp_path / f"{name}_32x32.mat", {"X": np.roll(RGB, number, 0).transpose(1, 2, 3, 0), "y": labels}
        )
    splits = items_of(f"arrays:{tmp_path}")
    assert list(splits) == ["train", "test", "extra"]
    for number, items in enumerate(splits.values()):
        assert_holds(items, np.roll(RGB, number, 0), labels.ravel() % 10)
    assert "label 10 of SVHN is the digit 0" in capsys.readouterr().err


def test_dsprites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and 1 become 0 and 255; latents are named, and one of them can be the class. Matthey et al. 2017."""
    binary = (RGB[..., 0] > 127).astype(np.uint8)
    classes = np.stack([np.zeros(12, int), LABELS, np.arange(12)], axis=1)
    path = tmp_path / "dsprites.npz"
    np.savez_compressed(
        path,
        metadata=np.array({"a": 1}, object),
        imgs=binary,
        latents_classes=classes,
        latents_values=classes / 7,
    )
    assert_holds(items_of(f"arrays:{path}")["train"], binary[..., None] * 255)
    said = capsys.readouterr().err
    for words in (
        "latents_classes int64 [12, 3]",
        "metadata (Python objects, which are not unpickled)",
        "0 and 1",
    ):
        assert words in said
    chosen = items_of(f"arrays:{path}", column="label=latents_classes.1")
    assert_holds(chosen["train"], binary[..., None] * 255, LABELS)
    with pytest.raises(UserError, match="the columns 0 to 2"):
        items_of(f"arrays:{path}", column="label=latents_classes.3")


@pytest.mark.parametrize(
    ("values", "images"),
    [
        (RGB / np.float32(255), RGB),
        (RGB / 255.0, RGB),
        ((RGB / 255.0).astype(np.float16), RGB),
        (RGB.astype(np.float32), RGB),
        (RGB / np.float32(127.5) - 1, RGB),
        (RGB > 100, (RGB > 100) * np.uint8(255)),
        ((RGB > 100).astype(np.float32), (RGB > 100) * np.uint8(255)),
        (RGB.astype(">f4"), RGB),
    ],
)
def test_values_that_tell_their_range_become_bytes(
    values: np.ndarray, images: np.ndarray, tmp_path: Path
) -> None:
    values, images = (np.concatenate([np.zeros_like(each[:1]), each]) for each in (values, images))
    if values.min() < 0:
        values, images = values[1:], images[1:]
    np.save(tmp_path / "x.npy", values)
    assert_holds(items_of(f"arrays:{tmp_path}/x.npy")["train"], images)


def choose_range(path: Path, low: float, high: float, sentence: str) -> None:
    """Do what the sentence says."""
    command = sentence[sentence.index("numpy.save(") :].removesuffix("'")
    names = {"numpy": np, "images": np.load(path), "LOW": low, "HIGH": high}
    exec(command.replace("'images.npy'", repr(str(path))), names)  # noqa: S102  # it is the remedy


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (RGB.astype(np.uint16) * 257, 0, 65535),
        (RGB.astype(np.int64), 0, 255),
        (RGB.astype(np.float32) / 100 - 0.7, -0.7, 1.85),
    ],
)
def test_values_that_do_not_tell_their_range_are_refused_with_a_remedy(
    values: np.ndarray, low: float, high: float, tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, values)
    with pytest.raises(DataError, match=f"{values.dtype}.*LOW and HIGH") as refused:
        items_of(f"arrays:{path}")
    choose_range(path, low, high, str(refused.value))
    assert_holds(items_of(f"arrays:{path}")["train"], RGB)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_counted(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 200)
    monkeypatch.setattr(array_images, "PROBED_IMAGES", 1)
    values = RGB.astype(np.float32)
    values[9, :2, 1, 0] = value
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(DataError, match=r"x\.npy: image 9 holds NaN or infinite values \(2\); .*nan_to_num"):
        items_of(f"arrays:{tmp_path}/x.npy")


def test_values_that_contradict_the_first_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 200)
    monkeypatch.setattr(array_images, "PROBED_IMAGES", 1)
    binary = (RGB > 127).astype(np.uint8)
    binary[9, 2, 2, 2] = 7
    np.save(tmp_path / "x.npy", binary)
    with pytest.raises(DataError, match=r"x\.npy: image 9 holds values from 0 to 7, those before it 0 and 1"):
        items_of(f"arrays:{tmp_path}/x.npy")


@pytest.mark.parametrize(
    ("values", "axes", "order"),
    [
        (RGB[:, :3].transpose(1, 3, 2, 0), "HCWN", (3, 0, 2, 1)),
        (RGB[:3, :, :3], "NHWC", (0, 1, 2, 3)),
        (RGB[:6, :, :, 0].transpose(1, 2, 0), "HWN", (2, 0, 1)),
        (RGB[:, :, :, 0].transpose(0, 2, 1), "NWH", (0, 2, 1)),
    ],
)
def test_column_chooses_the_layout(
    values: np.ndarray, axes: str, order: tuple[int, ...], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", values)
    items = items_of(f"arrays:{tmp_path}/x.npy", column=f"image=x:{axes}")["train"]
    images = values.transpose(order)
    assert_holds(items, images if images.ndim == 4 else images[..., None])


@pytest.mark.parametrize("shape", [(28, 28, 1, 3), (28, 28, 50), (1, 3, 28, 3), (32, 3, 3, 40), (28, 28, 3)])
def test_a_shape_that_allows_several_layouts_is_refused_with_a_way_out(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(np.prod(shape)).reshape(shape).astype(np.uint8))
    with pytest.raises(DataError, match=r"may be \w+ or \w+; choose with --column image=x:\w+$") as refused:
        items_of(f"arrays:{path}")
    items_of(f"arrays:{path}", column=str(refused.value).rpartition("--column ")[2])
    with pytest.raises(UserError, match="must name the axes"):
        items_of(f"arrays:{path}", column="image=x:NHQ")


def test_rows_of_pixels_are_reshaped_as_the_message_says(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, RGB.transpose(0, 3, 1, 2).reshape(12, -1))
    with pytest.raises(DataError, match=r"reshape it with numpy\.save") as refused:
        items_of(f"arrays:{path}")
    command = str(refused.value).partition("reshape it with ")[2].replace("'images.npy'", repr(str(path)))
    names = {"numpy": np, "images": np.load(path), "CHANNELS": 3, "HEIGHT": 6, "WIDTH": 5}
    exec(command, names)  # noqa: S102  # it is the remedy
    assert_holds(items_of(f"arrays:{path}")["train"], RGB)


def test_the_layout_can_be_chosen_for_a_file_that_is_named_for_its_split(tmp_path: Path) -> None:
    many = np.tile(GREY, (10, 1, 1, 1))
    for name, part in {"train": many[:60], "test": many[60:]}.items():
        np.save(tmp_path / f"{name}.npy", part[..., 0].transpose(1, 2, 0))
    with pytest.raises(DataError, match=r"--column image=:NHW$"):
        items_of(f"arrays:{tmp_path}")
    splits = items_of(f"arrays:{tmp_path}", column="image=:HWN")
    assert_holds(splits["train"], many[:60])
    assert_holds(splits["test"], many[60:])


def test_the_number_of_labels_tells_the_axis_of_the_images(tmp_path: Path) -> None:
    values = RGB[..., 0].transpose(1, 2, 0)
    np.savez(tmp_path / "x.npz", x=values, y=LABELS)
    assert_holds(items_of(f"arrays:{tmp_path}/x.npz")["train"], GREY, LABELS)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (RGB.reshape(12, 90), r"has the shape \[12, 90\]; .*reshape it"),
        (np.zeros((5, 20, 20, 17), np.uint8), r"has the shape \[5, 20, 20, 17\]; images must be"),
        (np.zeros((5, 8, 8, 4), np.uint8), r"\[5, 8, 8, 4\], which may be NHWC or NCHW"),
        (np.zeros((5, 8, 8, 8, 3), np.uint8), r"has the shape \[5, 8, 8, 8, 3\]"),
        (np.zeros((5, 0, 8), np.uint8), "0x8 pixels"),
        (np.zeros((5, 8, 8), np.complex64), "complex64"),
        (np.array([[["a"]]]), r"<U1 \[1, 1, 1\]"),
    ],
)
def test_arrays_that_are_no_images_are_named(values: np.ndarray, sentence: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=values)
    with pytest.raises(DataError, match=sentence):
        items_of(f"arrays:{tmp_path}/a.npz")


def test_labels_for_some_files_only_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a0.npz", images=RGB[:6], labels=LABELS[:6], extra_data=RGB)
    np.savez(tmp_path / "a1.npz", images=RGB[6:])
    with pytest.raises(
        DataError, match=r"1 arrays of labels for 2 arrays of images; leave them out with --column label=$"
    ):
        items_of(f"arrays:{tmp_path}")
    splits = items_of(f"arrays:{tmp_path}", column="label=")
    assert list(splits) == ["train"]
    assert_holds(splits["train"], RGB)
    said = capsys.readouterr().err
    assert "the images are in 2 files, a0.npz to a1.npz" in said
    assert "left out: labels int64 [6], extra_data uint8" in said


def test_several_sets_in_a_folder_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "faces.npz", images=RGB)
    np.savez(tmp_path / "cars.npz", images=RGB)
    with pytest.raises(DataError, match=r"2 arrays may be the images of train: .*give one of the files"):
        items_of(f"arrays:{tmp_path}")
    (tmp_path / "cars.npz").unlink()
    np.savez(tmp_path / "faces28.npz", images=RGB)
    np.savez(tmp_path / "faces64.npz", images=RGB[:, :4])
    (tmp_path / "faces.npz").unlink()
    with pytest.raises(DataError, match="different shapes or types; give one of the files"):
        items_of(f"arrays:{tmp_path}")
    assert_holds(items_of(f"arrays:{tmp_path}/faces28.npz")["train"], RGB)


def test_very_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_names, "MOST_FILES", 2)
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", images=RGB)
    with pytest.raises(DataError, match="holds 3 files of arrays; give a folder of at most 2"):
        items_of(f"arrays:{tmp_path}")


def test_one_image_in_each_npy_file_is_for_folder(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", RGB[number])
    with pytest.raises(DataError, match=rf"one image each; did you mean folder:{tmp_path}\?"):
        items_of(f"arrays:{tmp_path}")
    assert len(list(open_source(f"folder:{tmp_path}", holdout=0).splits["train"]().items)) == 3
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", RGB[:, :, :, number])
    with pytest.raises(DataError, match=rf"0\.npy holds several images; did you mean arrays:{tmp_path}\?"):
        open_source(f"folder:{tmp_path}", holdout=0).splits["train"]()
    assert_holds(
        items_of(f"arrays:{tmp_path}")["train"], np.concatenate([RGB[..., n : n + 1] for n in range(3)])
    )


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_a_limit_reads_the_first_images_and_a_dry_run_none(
    suffix: str, vaescale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"train.{suffix}"
    if suffix == "npy":
        np.save(path, RGB)
    elif suffix == "npz":
        np.savez_compressed(path, images=RGB)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["images"] = RGB
    blocks: list[int] = []
    monkeypatch.setattr(stored, "BLOCK_BYTES", RGB[0].nbytes)
    monkeypatch.setattr(array_images, "PROBED_IMAGES", 2)
    for kind in stored.Stored.__subclasses__():
        monkeypatch.setattr(kind, "_slices", counting(kind._slices, blocks))
    words = ("make-shards", f"arrays:{path}", tmp_path / "out", "--holdout", 0, "--json")
    dry = vaescale(*words, "--dry-run")
    assert dry.json["train"]["shapes"] == {"6x5x3 array": 12}
    assert len(blocks) <= 2, "only what tells the range of the values"
    blocks.clear()
    assert vaescale(*words, "--limit", 3).json["train"]["samples"] == 3
    assert len(blocks) <= 5
    assert vaescale(*words[:2], tmp_path / "all", *words[3:]).json["train"]["samples"] == 12


def counting(slices: Any, blocks: list[int]) -> Any:
    def counted(self: Any, axis: int, rows: int) -> Any:
        for block in slices(self, axis, rows):
            blocks.append(1)
            yield block

    return counted


def test_what_is_written_is_read_back(vaescale: Any, tmp_path: Path) -> None:
    """By the command line, from MATLAB's [H, W, C, N] to what training reads; some images of train become val."""
    savemat(tmp_path / "train_32x32.mat", {"X": RGB.transpose(1, 2, 3, 0), "y": LABELS[:, None] + 1})
    outcome = vaescale("make-shards", f"arrays:{tmp_path}", tmp_path / "out", "--holdout", 0.3, "--json")
    assert outcome.code == 0, outcome.err
    assert {name: split["image"] for name, split in outcome.json.items()} == dict.fromkeys(
        ("train", "val"), "6x5x3"
    )
    images, labels = {}, {}
    for name in outcome.json:
        with (tmp_path / "out" / name / "shard-000000.tar").open("rb") as file:
            for sample in samples(file):
                images[int(sample.key)], labels[int(sample.key)] = decode(sample.content), sample.label
    assert 0 < outcome.json["val"]["samples"] < 12
    assert np.array_equal([images[number] for number in range(12)], RGB)
    assert [labels[number] for number in range(12)] == LABELS.tolist()


def test_of_very_few_images_one_is_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", RGB[:3])
    splits = {name: split() for name, split in open_source(f"arrays:{tmp_path}/x.npy").splits.items()}
    assert {name: split.number for name, split in splits.items()} == {"train": 2, "val": 1}
    keys = [{item.key for item in split.items} for split in splits.values()]
    assert keys[0] | keys[1] == {"000000", "000001", "000002"}
