"""`vaescale make-shards` as a person types it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.data.config import DataConfig
from vaescale.data.pictures import FILTERS
from vaescale.data.reader import open_reader
from vaescale.errors import DataError


def pictures(folder: Path, count: int, *, size: tuple[int, int] = (30, 20)) -> dict[str, Image.Image]:
    """Smooth JPEG files of two classes."""
    y, x = np.mgrid[: size[1], : size[0]]
    made = {}
    for number in range(count):
        values = np.stack([x * 8, y * 12, (x + y) * 4 + number], axis=2).astype(np.uint8)
        path = folder / ("cat", "dog")[number % 2] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path, quality=95)
        made[f"{path.parent.name}/{path.stem}"] = Image.open(io.BytesIO(path.read_bytes()))
    return made


def read(folder: Path, size: int, **changes) -> dict[str, np.ndarray]:
    """Key to image of everything in a folder of shards."""
    values = {"train": "", "val": "", "image_size": size, "channels": 3, "global_batch": 1}
    opened = open_reader(str(folder), DataConfig(**{**values, **changes}))
    got = [opened[number] for number in range(len(opened))]
    return {one.keys[0]: one.images[0].permute(1, 2, 0).numpy() for one in got}


def test_a_folder_cut_to_size(vaescale, tmp_path: Path) -> None:
    originals = pictures(tmp_path / "photos", 12)
    words = ("make-shards", f"folder:{tmp_path}/photos", tmp_path / "out", "--size", 8, "--resample", "box")
    outcome = vaescale(*words, "--holdout", 0.3, "--shard-samples", 5, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["train"]["image"] == "8x8x3"
    assert outcome.json["train"]["classes"] == 2
    images = read(tmp_path / "out" / "train", 8) | read(tmp_path / "out" / "val", 8)
    assert images.keys() == originals.keys()
    for key, image in images.items():
        square = originals[key].convert("RGB").crop((5, 0, 25, 20)).resize((8, 8), FILTERS["box"])
        assert np.array_equal(image, np.asarray(square))


@pytest.mark.parametrize(("crop", "box"), [("whole", (0, 0, 30, 20)), ("10", (10, 5, 20, 15))])
def test_crops_are_those_of_reading(vaescale, tmp_path: Path, crop: str, box: tuple[int, ...]) -> None:
    """Cut when written or cut when read: the same image."""
    originals = pictures(tmp_path / "photos", 3)
    source = f"folder:{tmp_path}/photos"
    options = ("--holdout", 0, "--crop", crop, "--size", 8)
    assert vaescale("make-shards", source, tmp_path / "cut", *options).code == 0
    assert vaescale("make-shards", source, tmp_path / "kept", "--holdout", 0).code == 0
    written = read(tmp_path / "cut" / "train", 8)
    while_reading = read(tmp_path / "kept" / "train", 8, crop=int(crop) if crop.isdecimal() else crop)
    for key, image in written.items():
        assert np.array_equal(image, while_reading[key])
        expected = np.asarray(originals[key].convert("RGB").crop(box).resize((8, 8), FILTERS["bicubic"]))
        assert np.abs(image.astype(int) - expected).max() <= 1


def test_celeba_keeps_the_centre_148(vaescale, tmp_path: Path) -> None:
    originals = pictures(tmp_path / "img_align_celeba", 2, size=(178, 218))
    for path in list((tmp_path / "img_align_celeba").rglob("*.jpg")):
        path.rename(tmp_path / "img_align_celeba" / path.name)
    words = ("make-shards", f"celeba:{tmp_path}", tmp_path / "out", "--holdout", 0)
    assert vaescale(*words, "--size", 64).code == 0
    image = read(tmp_path / "out" / "train", 64)["000"]
    centre = originals["cat/000"].convert("RGB").crop((15, 35, 163, 183)).resize((64, 64), FILTERS["bicubic"])
    assert np.abs(image.astype(int) - np.asarray(centre)).max() <= 1
    vaescale(*words, "--size", 64, "--crop", 140).assert_refused(2, "made otherwise (crop 148 -> 140)", "OUT")


def test_imagenet_is_averaged_down_whole(vaescale, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 2, size=(40, 24))
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "n01440764")
    (tmp_path / "photos" / "dog").rename(tmp_path / "photos" / "n01443537")
    words = ("make-shards", f"imagenet:{tmp_path}/photos", tmp_path / "out", "--size", 8, "--holdout", 0)
    assert vaescale(*words, "--json").json["train"]["classes"] == 2
    image = read(tmp_path / "out" / "train", 8)["n01440764/000"]
    whole = np.asarray(Image.open(tmp_path / "photos" / "n01440764" / "000.jpg")).astype(float)
    means = whole.reshape(8, 3, 8, 5, 3).mean((1, 3))
    assert np.abs(image - means).max() <= 1


def test_a_broken_file_is_named_or_left_out(vaescale, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 6)
    (tmp_path / "photos" / "cat" / "000.jpg").write_bytes(b"<html>404</html>")
    words = ("make-shards", f"folder:{tmp_path}/photos", tmp_path / "out", "--holdout", 0)
    vaescale(*words).assert_refused(3, "cat/000.jpg: it is an HTML page", "--skip-broken")
    outcome = vaescale(*words, "--skip-broken", "--json")
    assert outcome.json["train"]["samples"] == 5
    assert outcome.json["train"]["skipped"] == 1
    assert "skipped" in outcome.err
    table = outcome.json["train"]["made"]["table"]
    assert table["passed_over"]["format"]["images"] == 1
    shown = vaescale(*words, "--skip-broken").out  # of the index that is there
    assert "cannot be used: format" in shown
    assert "cat/000.jpg: it is an HTML page" in shown


def test_a_missing_shard_is_written_anew(vaescale, tmp_path: Path) -> None:
    words = ("make-shards", "digits", tmp_path, "--shard-samples", 500, "--json")
    first = vaescale(*words).json
    (tmp_path / "train" / "shard-000001.tar").unlink()
    assert vaescale("verify-shards", tmp_path / "train").code == 3
    again = vaescale(*words)
    assert again.json == first
    assert "shard-000001.tar missing or damaged; writing 1 of 3 shards again" in again.err
    assert vaescale("verify-shards", tmp_path / "train").code == 0


@pytest.mark.distributed
def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Two processes of `vaescale make-shards`, interrupted as a terminal does it."""
    pictures(tmp_path / "photos", 7200)  # or a busy machine ends before it is interrupted
    words = ["make-shards", f"folder:{tmp_path}/photos", str(tmp_path / "out"), "--size", "16", "--jobs", "2"]
    words += ["--shard-samples", "50", "--holdout", "0"]
    command = [sys.executable, "-m", "vaescale", *words]
    # A shell ignores SIGINT in what it starts in the background, and Python then installs no handler.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((tmp_path / "out" / "train").glob("shard-*.tar"))) < 5:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.strip().endswith("vaescale make-shards: stopped; the same command continues where it stopped")
    assert "Traceback" not in err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").glob("shard-*.tar")}
    assert 5 <= len(before) < 144
    subprocess.run(command, check=True, capture_output=True)
    kept = [path for path in before if path.stat().st_mtime_ns == before[path]]
    assert len(kept) >= len(before) - 2, "but for one in each process that had no note yet"
    assert (
        subprocess.run(
            [*command[:3], "verify-shards", str(tmp_path / "out" / "train")], check=False
        ).returncode
        == 0
    )


def test_about_so_many_bytes(vaescale, tmp_path: Path) -> None:
    words = ("make-shards", "digits", tmp_path / "digits", "--shard-bytes", "0.5MB", "--json")
    assert vaescale(*words).json["train"]["shards"] == 6


def test_tars_of_others(vaescale, tmp_path: Path) -> None:
    from webdataset import TarWriter

    pictures(tmp_path / "photos", 4)
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for path in sorted((tmp_path / "photos").rglob("*.jpg")):
            tar.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": b"1"})
    outcome = vaescale("make-shards", "--index-only", tmp_path, "--json")
    assert outcome.json["index"]["samples"] == 4
    assert vaescale("verify-shards", tmp_path, "--deep").code == 0
    assert len(read(tmp_path, 8, crop="square")) == 4
    vaescale("make-shards", "--index-only", tmp_path / "a.tar").assert_refused(2, "is not a folder")
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    vaescale("make-shards", "--index-only", tmp_path).assert_refused(3, "b.tar: it is cut")


REFUSED = {
    "no out": (["digits"], "SOURCE and OUT are needed"),
    "nothing": ([], "SOURCE and OUT are needed"),
    "index elsewhere": (
        ["digits", "x", "--index-dir", "y"],
        "--index-dir is for --index-only DIR",
    ),
    "member": (
        ["digits", "x", "--image-member", "jpg"],
        "--image-member is for --index-only DIR",
    ),
    "column": (
        ["digits", "x", "--column", "label=x"],
        "--column is for hf:, arrays:, cifar: and bair: sources",
    ),
    "both": (["digits", "x", "--index-only", "."], "leave SOURCE and OUT out"),
    "size": (["digits", "x", "--size", "0"], "argument --size: 0 must be from 1 to 16384"),
    "crop alone": (["digits", "x", "--crop", "square"], "add --size PIXELS"),
    "crop word": (
        ["digits", "x", "--size", "8", "--crop", "round"],
        "--crop (=round) must be square, aspect, whole or",
    ),
    "keep and size": (["digits", "x", "--size", "8", "--encoding", "keep"], "--encoding keep stores files"),
    "bytes": (
        ["digits", "x", "--shard-bytes", "lots"],
        "'lots': give a number of bytes or a size such as 100MB",
    ),
    "quality": (["digits", "x", "--quality", "101"], "argument --quality: 101 must be from 1 to 100"),
    "quality of npy": (["digits", "x", "--quality", "90"], "--quality (=90) is for --encoding jpg"),
    "two sizes": (["digits", "x", "--shard-bytes", "1MB", "--shard-samples", "5"], "not allowed with"),
    "jobs": (["digits", "x", "--jobs", "0"], "argument --jobs: 0 must be from 1 to 1024"),
    "holdout": (
        ["digits", "x", "--holdout", "1"],
        "argument --holdout: 1 must be at least 0 and at most 0.9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(vaescale, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[name]
    vaescale("make-shards", *words).assert_refused(2, message)
    assert not list(tmp_path.iterdir())


def test_the_index_says_how_it_was_made(vaescale, tmp_path: Path) -> None:
    vaescale("make-shards", "digits", tmp_path, "--size", 4, "--encoding", "webp", "--channels", 3)
    made = json.loads((tmp_path / "val" / "index.json").read_text())["made"]
    assert made["source"] == "digits"
    assert (made["split"], made["size"], made["crop"], made["resample"]) == ("val", 4, "square", "bicubic")
    assert (made["encoding"], made["channels"]) == ("webp", 3)


def test_transparent_images_need_a_colour(vaescale, tmp_path: Path) -> None:
    """The remedy of the fault is tried as it is printed."""
    (tmp_path / "clear").mkdir()
    for number in range(3):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear" / f"{number}.png")
    words = ("make-shards", f"folder:{tmp_path}/clear", tmp_path / "out", "--size", 4, "--holdout", 0)
    vaescale(*words).assert_refused(3, "transparent; write the shards with --flatten white")
    outcome = vaescale(*words, "--flatten", "white")
    assert outcome.code == 0, outcome.err
    assert "3 of 3 images are transparent and were put on the colour of --flatten" in outcome.err
    assert {int(value) for image in read(tmp_path / "out" / "train", 4).values() for value in image.flat} == {
        255
    }
    vaescale(*words[:2], tmp_path / "no", "--flatten", "nocolour").assert_refused(2, "--flatten (=nocolour)")


def test_the_remedies_for_shards_that_do_not_fit_a_recipe_work(vaescale, tmp_path: Path) -> None:
    """Another size or number of channels in the same folder is refused; both ways out of that work."""
    pictures(tmp_path / "photos", 6)
    words = ("make-shards", f"folder:{tmp_path}/photos", tmp_path / "out", "--holdout", 0)
    assert vaescale(*words).code == 0
    with pytest.raises(DataError, match=r"write the shards again to another folder with --channels 1"):
        read(tmp_path / "out" / "train", 8, channels=1, crop="square")
    options = ("--size", 8, "--channels", 1)
    vaescale(*words, *options).assert_refused(
        2, "channels unset -> 1", "size unset -> 8", "delete it or choose another OUT"
    )
    other = tuple(tmp_path / "other" if word == tmp_path / "out" else word for word in words)
    assert vaescale(*other, *options).code == 0
    shutil.rmtree(tmp_path / "out" / "train")
    assert vaescale(*words, *options).code == 0
    assert len(read(tmp_path / "out" / "train", 8, channels=1)) == 6
    assert len(read(tmp_path / "other" / "train", 8, channels=1)) == 6
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "cat" / "odd.png")
    mixed = tuple(tmp_path / "mixed" if word == tmp_path / "out" else word for word in words)
    assert vaescale(*mixed).code == 0
    with pytest.raises(DataError, match=r"several sizes .* to another folder with .*--size 8 --channels 3"):
        read(tmp_path / "mixed" / "train", 8)
    assert len(read(tmp_path / "mixed" / "train", 8, crop="square")) == 7


def test_a_source_that_changed_is_not_taken_for_the_one_that_was_written(vaescale, tmp_path: Path) -> None:
    pictures(tmp_path / "set", 4)
    words = ("make-shards", f"folder:{tmp_path}/set", tmp_path / "out", "--holdout", "0")
    assert vaescale(*words).code == 0
    assert "already exists" in vaescale(*words).err
    shutil.copy(tmp_path / "set/cat/000.jpg", tmp_path / "set/cat/more.jpg")
    vaescale(*words).assert_refused(2, "holds the shards of 4 images, and the source has 5 now")

    np.savez(tmp_path / "a.npz", images=np.zeros((20, 8, 8), np.uint8))
    words = (
        "make-shards",
        f"arrays:{tmp_path}/a.npz",
        tmp_path / "of",
        "--holdout",
        "0",
        "--shard-samples",
        "5",
    )
    assert vaescale(*words).code == 0
    later = (tmp_path / "of/train/index.json").stat().st_mtime + 10
    os.utime(tmp_path / "a.npz", (later, later))
    touched = vaescale(*words)
    assert touched.code == 0
    assert "a.npz was changed after the shards in" in touched.err
    (tmp_path / "of/train/shard-000001.tar").unlink()
    vaescale(*words).assert_refused(2, "was changed after", "some of them are missing")


def test_a_single_image_is_not_taken_from_train(vaescale, tmp_path: Path) -> None:
    pictures(tmp_path / "set", 1)
    words = ("make-shards", f"folder:{tmp_path}/set", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        vaescale(*words, *more).assert_refused(
            3, "gives one image, too few to hold some out", "--holdout 0 writes it"
        )
    assert vaescale(*words, "--holdout", "0").code == 0
    inside = vaescale("make-shards", f"folder:{tmp_path}/set", tmp_path / "set/out", "--holdout", "0")
    inside.assert_refused(2, "is within the images of", "choose a folder outside of it")
