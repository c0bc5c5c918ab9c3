"""Each source lists the right images with the right classes, in splits that do not overlap."""

import gzip
import io
import itertools
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vaescale.data.making.items import open_item
from vaescale.data.making.sources import open_source
from vaescale.data.pictures import decode
from vaescale.errors import DataError, UserError


def picture(path: Path, value: int, *, size: tuple[int, int] = (6, 5)) -> bytes:
    """A picture of one grey value, which says who it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path.read_bytes()


def listed(word: str, **options) -> dict[str, dict[str, tuple[int, int]]]:
    """For each split, key -> (class, the picture's value)."""
    result = {}
    for name, split in open_source(word, **options).splits.items():
        whole = split()
        items = list(whole.items)
        assert whole.number in (None, len(items))
        assert len({item.key for item in items}) == len(items)
        result[name] = {item.key: (item.label, int(np.median(decode(open_item(item))))) for item in items}
    return result


def test_every_digit_is_in_exactly_one_split() -> None:
    splits = {name: list(split().items) for name, split in open_source("digits").splits.items()}
    assert {split: len(items) for split, items in splits.items()} == {"train": 1437, "val": 360}
    keys = [int(item.key) for items in splits.values() for item in items]
    assert sorted(keys) == list(range(1797))
    bunch = load_digits()
    for item in splits["train"] + splits["val"]:
        assert np.array_equal(np.rint(item.content[:, :, 0] * (16 / 255)), bunch.images[int(item.key)])
        assert item.label == bunch.target[int(item.key)]
    counts = np.bincount([item.label for item in splits["val"]])
    assert counts.min() >= 34
    assert counts.max() <= 37


@pytest.mark.parametrize(
    "word", ["celebahq", "digits:x", "folder", "folder:", "celeba", "pipe:cat /etc/passwd"]
)
def test_an_unknown_source_names_the_known_ones(word: str) -> None:
    with pytest.raises(UserError, match=r"digits, idx:PATH, folder:PATH, celeba:PATH, .*hf:NAME"):
        open_source(word)


@pytest.mark.parametrize("kind", ["folder", "celeba", "imagenet", "idx"])
def test_a_path_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(f"{kind}:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no"):
        [split() for split in open_source(f"{kind}:{tmp_path}/empty").splits.values()]


def test_a_folder_of_classes_is_split_by_key(tmp_path: Path) -> None:
    for number in range(200):
        picture(tmp_path / ("cat", "dog")[number % 2] / f"{number}.png", number)
    splits = listed(f"folder:{tmp_path}", holdout=0.2)
    assert set(splits) == {"train", "val"}
    assert not splits["train"].keys() & splits["val"].keys()
    assert 20 < len(splits["val"]) < 60
    everything = splits["train"] | splits["val"]
    assert everything == {f"{('cat', 'dog')[n % 2]}/{n}": (n % 2, n) for n in range(200)}
    picture(tmp_path / "cat" / "zz.png", 7)
    again = listed(f"folder:{tmp_path}", holdout=0.2)
    assert splits["val"].keys() <= again["val"].keys(), "a new image moves no other"
    assert list(listed(f"folder:{tmp_path}", holdout=0)) == ["train"]


def test_a_folder_s_images_are_mixed_always_alike(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "train" / f"class{number // 20}" / f"{number}.png", number)
    labels = [label for label, _ in listed(f"folder:{tmp_path}")["train"].values()]
    assert labels != sorted(labels)
    assert labels == [label for label, _ in listed(f"folder:{tmp_path}")["train"].values()]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    assert runs > 25, "a true permutation of three classes of 20 has 41 +- 4 runs"


def test_links_are_followed_and_no_image_is_lost_in_silence(tmp_path: Path, capsys) -> None:
    picture(tmp_path / "elsewhere" / "1.png", 10)
    picture(tmp_path / "photos" / "dog" / "2.png", 20)
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "dog" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "eel").symlink_to(tmp_path / "elsewhere")
    Image.new("RGB", (4, 4), (30,) * 3).save(tmp_path / "photos" / "dog" / "3.bmp")
    (tmp_path / "photos" / "dog" / "notes.txt").write_text("")
    split = listed_as_written(f"folder:{tmp_path}/photos", tmp_path / "out")
    assert split == {"cat/1": (0, 10), "dog/2": (1, 20), "dog/3": (1, 30), "eel/1": (2, 10)}
    assert "not images in" in capsys.readouterr().err


def listed_as_written(word: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Key to class and value of what arrives in the shards."""
    from vaescale.data.making.storing import Making
    from vaescale.data.making.writing import write_shards
    from vaescale.data.tars import samples

    write_shards(open_source(word, holdout=0).splits["train"]().items, folder, Making(encoding="keep"))
    with (folder / "shard-000000.tar").open("rb") as file:
        return {one.key: (one.label, int(np.median(decode(one.content)))) for one in samples(file)}


def test_a_small_set_has_a_held_out_image(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    assert {name: len(split) for name, split in listed(f"folder:{tmp_path}").items()} == {
        "train": 3,
        "val": 1,
    }


def test_odd_names_make_keys_that_can_be_written(tmp_path: Path) -> None:
    names = ["a 10.00.00\u202fAM.png", "b\nc.png", "d\udce9.png"]
    for number, name in enumerate(names):
        picture(tmp_path / "photos" / name, 50 * number)
    split = listed_as_written(f"folder:{tmp_path}/photos", tmp_path / "out")
    assert sorted(split.values()) == [(-1, 0), (-1, 50), (-1, 100)]


def test_what_lies_beside_the_splits_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "1.png", 1)
    picture(tmp_path / "extra" / "2.png", 2)
    with pytest.raises(DataError, match="and also extra"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "extra").rename(tmp_path / "val")
    (tmp_path / "valid").mkdir()
    with pytest.raises(
        DataError, match=r"val and valid, .* --splits train=train,val=val, or .* --classes-only"
    ):
        open_source(f"folder:{tmp_path}")


def test_a_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    for number, split in enumerate(["train", "train", "valid", "test"]):
        picture(tmp_path / split / f"{number}.jpg", 10 * number)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("nor this")
    values = {
        name: {value for _, value in split.values()} for name, split in listed(f"folder:{tmp_path}").items()
    }
    assert values == {"train": {0, 10}, "val": {20}, "test": {30}}


def test_names_with_dots_and_twins_get_keys_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(["a.b.png", "a_b.png", "a_b.jpg", "ü.png"]):
        picture(tmp_path / "train" / name, number * 20)
    split = listed(f"folder:{tmp_path}", holdout=0)["train"]
    assert sorted(value for _, value in split.values()) == [0, 20, 40, 60]
    assert not any("." in key for key in split)


def test_celeba_takes_its_partition(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "img_align_celeba" / f"{number:06d}.jpg", 30 * number, size=(178, 218))
    lines = [f"{number:06d}.jpg {part}" for number, part in enumerate([0, 0, 0, 1, 2, 2])]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    splits = listed(f"celeba:{tmp_path}")
    assert {name: sorted(split) for name, split in splits.items()} == {
        "train": ["000000", "000001", "000002"],
        "val": ["000003"],
        "test": ["000004", "000005"],
    }
    assert splits["test"]["000005"] == (-1, 150)
    assert open_source(f"celeba:{tmp_path}/img_align_celeba").splits.keys() == splits.keys()
    assert open_source(f"celeba:{tmp_path}").crop == 148
    csv = "image_id,partition\n" + "\n".join(line.replace(" ", ",") for line in lines)
    (tmp_path / "list_eval_partition.txt").unlink()
    assert open_source(f"celeba:{tmp_path}").splits.keys() == {"train", "val"}, "held out by key"
    (tmp_path / "list_eval_partition.csv").write_text(csv)
    assert listed(f"celeba:{tmp_path}") == splits
    (tmp_path / "img_align_celeba" / "000004.jpg").unlink()
    with pytest.raises(DataError, match=r"1 images that are missing, such as 000004.jpg"):
        open_source(f"celeba:{tmp_path}")


def _tar(path: Path, files: list[tuple[str, bytes]]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def test_imagenet_s_folders_tars_and_tar_of_tars_are_one_set(tmp_path: Path) -> None:
    wnids, tars = ["n02000002", "n01000001"], []
    for row, wnid in enumerate(wnids):
        images = [
            (
                f"{wnid}_{i}.JPEG",
                picture(tmp_path / "a" / "train" / wnid / f"{wnid}_{i}.JPEG", 100 * row + 10 * i),
            )
            for i in range(3)
        ]
        picture(tmp_path / "a" / "val" / wnid / f"val_{row}.JPEG", 200 + row)
        tars.append((f"{wnid}.tar", _tar(tmp_path / "b" / "train" / f"{wnid}.tar", images)))
    _tar(tmp_path / "c" / "ILSVRC2012_img_train.tar", tars)
    picture(tmp_path / "c" / "val" / "n01000001" / "v.JPEG", 5)
    folders = listed(f"imagenet:{tmp_path}/a")
    assert folders["train"]["n01000001/n01000001_2"] == (0, 120), "classes are the places of the sorted wnids"
    assert folders["train"]["n02000002/n02000002_0"] == (1, 0)
    assert {label for label, _ in folders["val"].values()} == {0, 1}
    source = open_source(f"imagenet:{tmp_path}/a")
    assert (source.crop, source.resample) == ("whole", "box")
    assert source.splits["val"]().class_names == ("n01000001", "n02000002")
    assert listed(f"imagenet:{tmp_path}/b", holdout=0)["train"] == folders["train"]
    assert listed(f"imagenet:{tmp_path}/c", holdout=0)["train"] == folders["train"]
    assert listed(f"imagenet:{tmp_path}/c/ILSVRC2012_img_train.tar", holdout=0)["train"] == folders["train"]


@pytest.mark.parametrize("damage", ["gzip", "cut"])
def test_a_broken_imagenet_tar_is_one_sentence(tmp_path: Path, damage: str) -> None:
    content = _tar(tmp_path / "train" / "n01000001.tar", [("x.JPEG", picture(tmp_path / "x.JPEG", 1))])
    content = gzip.compress(content) if damage == "gzip" else content[:700]
    (tmp_path / "train" / "n01000001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"n01000001"):
        open_source(f"imagenet:{tmp_path}").splits["train"]()
    with pytest.raises(DataError):
        open_source(f"imagenet:{tmp_path}/train/n01000001.tar")


def test_a_flat_imagenet_val_has_no_classes_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "n01000001" / "x.JPEG", 0)
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 50)
    assert listed(f"imagenet:{tmp_path}")["val"] == {"ILSVRC2012_val_00000001": (-1, 50)}
    picture(tmp_path / "val" / "n09999999" / "y.JPEG", 0)
    with pytest.raises(DataError, match="class n09999999, which train has not"):
        open_source(f"imagenet:{tmp_path}")


def _idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    content = head + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    images = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((7, 4, 5), np.uint8)
    _idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    _idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.arange(7, dtype=np.uint8) % 3)
    _idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[:2])
    assert list(open_source(f"idx:{tmp_path}", holdout=0.1).splits) == ["train", "test", "val"]
    assert list(open_source(f"idx:{tmp_path}").splits) == ["train", "test"], (
        "where there is a test, no train is cut"
    )
    source = open_source(f"idx:{tmp_path}", holdout=0)
    train, test = source.splits["train"](), source.splits["test"]()
    assert [item.label for item in train.items] == [0, 1, 2, 0, 1, 2, 0]
    assert train.class_names == ("0", "1", "2")
    assert np.array_equal(np.stack([item.content[..., 0] for item in train.items]), images)
    assert [item.label for item in test.items] == [-1, -1]


def test_stacked_images_have_channels_that_their_number_draws(tmp_path: Path) -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((100, 4, 5), np.uint8)
    _idx(tmp_path / "train-images-idx3-ubyte", images)
    _idx(tmp_path / "t10k-images-idx3-ubyte", images[:20])
    with pytest.raises(DataError, match="no labels of train"):
        open_source(f"stacked:{tmp_path}").splits["train"]()
    _idx(tmp_path / "train-labels-idx1-ubyte", np.arange(100, dtype=np.uint8) % 10)
    _idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    source = open_source(f"stacked:{tmp_path}")
    train, test = source.splits["train"](), source.splits["test"]()
    assert len(train.class_names) == 1000
    assert train.class_names[731] == "731"
    drawn = np.stack([item.content[0, 0] for item in train.items]).astype(int)
    assert [item.label for item in train.items] == (drawn % 10 @ [100, 10, 1]).tolist()
    assert all(item.content.shape == (4, 5, 3) for item in train.items)
    assert len(np.unique(drawn)) > 90, "300 channels of 100 images"
    few = np.stack([item.content[0, 0] for item in test.items])
    assert few.max() < 20
    again = open_source(f"stacked:{tmp_path}").splits["train"]()
    assert all(np.array_equal(a.content, b.content) for a, b in zip(train.items, again.items, strict=True))


@pytest.mark.parametrize("fault", ["cut", "long", "magic", "huge", "labels", "gzip", "two sets"])
def test_broken_idx_files_are_refused(tmp_path: Path, fault: str) -> None:
    path, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    _idx(path, np.zeros((3, 4, 4), np.uint8))
    _idx(labels, np.zeros(3, np.uint8))
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[:-1])
    elif fault == "long":
        path.write_bytes(content + b"x")
    elif fault == "magic":
        path.write_bytes(b"\0\0\x0d\x03" + content[4:])
    elif fault == "huge":
        path.write_bytes(content[:4] + b"\xff" * 12)
    elif fault == "labels":
        _idx(labels, np.zeros(2, np.uint8))
    elif fault == "gzip":
        path.unlink()
        path.with_suffix(".gz").write_bytes(gzip.compress(content)[:-9])
    else:
        _idx(tmp_path / "emnist-train-images-idx3-ubyte", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(DataError) as caught:
        open_source(f"idx:{tmp_path}").splits["train"]()
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set in the hub's format: parquet files with an image and a class column."""
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    for split, count in (("train", 5), ("validation", 2)):
        rows = {
            "id": list(range(count)),
            "img": [Image.new("L", (4, 4), 20 * i) for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        data = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "hub"


def test_hugging_face(hub: Path) -> None:
    splits = listed(f"hf:{hub}")
    assert {name: sorted(split.values()) for name, split in splits.items()} == {
        "train": [(0, 0), (0, 40), (0, 80), (1, 20), (1, 60)],
        "val": [(0, 0), (1, 20)],
    }
    assert open_source(f"hf:{hub}").splits["val"]().class_names == ("cat", "dog")
    assert list(listed(f"hf:{hub}:train")) == ["train"], "who names a split wants that one"


def test_hugging_face_archives_and_missing_images(tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet

    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for number in range(4):
            content = picture(tmp_path / "scratch.png", 20 * number)
            archive.writestr(f"{number}.png", content)
    (tmp_path / "scratch.png").unlink()
    assert sorted(listed(f"hf:{tmp_path}", holdout=0)["train"].values()) == [
        (-1, 0),
        (-1, 20),
        (-1, 40),
        (-1, 60),
    ]
    secret = tmp_path / "secret.png"
    picture(secret, 99)
    rows = {"img": [Image.new("L", (4, 4), 20), None, {"bytes": None, "path": str(secret)}]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"img": datasets.Image()}))
    (tmp_path / "null").mkdir()
    data = data.cast_column("img", datasets.Image(decode=False))
    # As somebody else's tools might: datasets' own writer would put the file's bytes into the row.
    pyarrow.parquet.write_table(data.data.table, tmp_path / "null" / "train-00000-of-00001.parquet")
    items = list(open_source(f"hf:{tmp_path}/null:train").splits["train"]().items)
    assert items[1].content == b"", "which --skip-broken leaves out"
    assert items[2].content == b"", "a row may not name any file of this machine"


def test_a_stream_is_split_by_key(hub: Path) -> None:
    source = open_source(f"hf:{hub}", holdout=0.5)
    assert set(source.splits) == {"train", "val"}
    assert not source.held_out, "it has its own"


def test_hugging_face_image_folders(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "train" / ("cat", "dog")[number % 2] / f"{number}.png", 20 * number)
    assert sorted(listed(f"hf:{tmp_path}", holdout=0)["train"].values()) == [
        (0, 0),
        (0, 40),
        (1, 20),
        (1, 60),
    ]


def test_hugging_face_faults_are_one_sentence(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf:.*:night cannot be opened"):
        open_source(f"hf:{hub}:night")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="words has no image column"):
        [split() for split in open_source(f"hf:{tmp_path}/words").splits.values()]
