"""A wrong kind of source is answered with the right one, which then reads the files."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_arrays import LABELS, RGB
from tests.data.test_batches import binary_100, imagenet, python_10
from vaescale.data.making.sources import SOURCES, open_source
from vaescale.errors import DataError, UserError


def mnist(path: Path) -> Path:
    (path / "MNIST" / "raw").mkdir(parents=True)
    images = struct.pack(">4B3I", 0, 0, 8, 3, 4, 6, 5) + bytes(120)
    (path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(images)
    return path


def photos(path: Path) -> Path:
    (path / "cat").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(RGB[number]).save(path / "cat" / f"{number}.png")
    return path


def faces(path: Path) -> Path:
    (path / "img_align_celeba").mkdir(parents=True)
    Image.new("RGB", (178, 218)).save(path / "img_align_celeba" / "000001.jpg")
    return path


def wnids(path: Path) -> Path:
    (path / "train" / "n01440764").mkdir(parents=True)
    Image.fromarray(RGB[0]).save(path / "train" / "n01440764" / "a.png")
    return path


def one_file(path: Path) -> Path:
    path.mkdir()
    np.savez(path / "set.npz", images=RGB, labels=LABELS)
    return path / "set.npz"


def archive_in_folder(path: Path) -> Path:
    return one_file(path).parent


def npy_files(path: Path) -> Path:
    path.mkdir()
    np.save(path / "train_images.npy", RGB)
    np.save(path / "train_labels.npy", LABELS)
    return path


def batches(path: Path) -> Path:
    imagenet(path, "5", batches=2)
    return path


# What is there, and the argument that reads it.
HELD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "MNIST": (mnist, "idx:{}/MNIST/raw"),
    "photographs": (photos, "folder:{}"),
    "CelebA": (faces, "celeba:{}"),
    "ILSVRC": (wnids, "imagenet:{}"),
    "down-sampled ImageNet": (batches, "imagenet:{}"),
    "CIFAR-10": (python_10, "cifar:{}"),
    "CIFAR-100": (binary_100, "cifar:{}"),
    "an .npz file": (one_file, "arrays:{}"),
    "a folder of arrays": (archive_in_folder, "arrays:{}"),
    ".npy files": (npy_files, "arrays:{}"),
}
READ_BY = {
    ".npy files": {"celeba"},  # as files of one image, which they are not
    "photographs": {"folder"},
    "CelebA": {"folder", "celeba"},
    "ILSVRC": {"folder", "imagenet"},
}


def read(word: str) -> int:
    return sum(len(list(split().items)) for split in open_source(word, holdout=0).splits.values())


@pytest.mark.parametrize("held", HELD)
def test_the_right_kind_is_named_and_reads_the_files(held: str, tmp_path: Path) -> None:
    write, form = HELD[held]
    path = write(tmp_path / "set")
    right = form.format(path)
    assert read(right) > 0
    with pytest.raises(UserError, match="is unknown; ") as refused:
        open_source(str(path))
    assert f"did you mean {right}? " in str(refused.value)
    readable = READ_BY.get(held, set()) | {right.partition(":")[0]}
    for kind in ("idx", "folder", "celeba", "imagenet", "arrays", "cifar"):
        assert kind in SOURCES
        if kind in readable:
            continue
        with pytest.raises(DataError) as wrong:
            read(f"{kind}:{path}")
        assert str(wrong.value).endswith(f"did you mean {right}?"), wrong.value


def test_a_user_who_does_not_exist_is_no_traceback() -> None:
    for word in ("~nobody-of-this-name/x", "arrays:~nobody-of-this-name/x.npz"):
        with pytest.raises(UserError, match="nobody-of-this-name"):
            open_source(word)


def test_an_error_of_the_right_kind_stays(tmp_path: Path) -> None:
    path = one_file(tmp_path / "set").parent
    photos(path / "pictures")
    np.savez(path / "set.npz", images=RGB, labels=LABELS[:5])
    with pytest.raises(DataError, match="5 labels for 12 images; choose another array"):
        read(f"arrays:{path}")
    (path / "set.npz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"fetch it again$"):
        read(f"arrays:{path}")


def test_a_single_file_of_a_set_names_its_folder(tmp_path: Path) -> None:
    folder = python_10(tmp_path / "cifar")
    raw = mnist(tmp_path / "mnist") / "MNIST" / "raw"
    batch = batches(tmp_path / "imagenet") / "train_data_batch_2"
    for path, right in {
        folder / "data_batch_2": f"cifar:{folder}",
        raw / "train-images-idx3-ubyte": f"idx:{raw}",
        batch: f"imagenet:{batch.parent}",
    }.items():
        for word in (f"folder:{path}", f"arrays:{path}"):
            with pytest.raises(DataError, match=f"did you mean {right}\\?$"):
                read(word)
        assert read(right) > 0


@pytest.mark.parametrize(
    ("kind", "needs"), [("arrays", "a .npz, .npy, .mat or .h5 file"), ("cifar", "the folder of the batches")]
)
def test_a_path_that_does_not_exist_says_what_is_needed(kind: str, needs: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"nowhere does not exist; give {needs}"):
        open_source(f"{kind}:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no"):
        open_source(f"{kind}:{tmp_path}/empty")
