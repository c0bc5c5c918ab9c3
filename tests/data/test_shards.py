"""Shards: round trip, readable by plain webdataset, deterministic, and each fault refused with one sentence."""

import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vaescale.data.shards import INDEX, Sample, read_index, read_offsets, write_shards
from vaescale.errors import DataError


@pytest.fixture
def written(tmp_path: Path, make_samples) -> tuple[Path, list[Sample]]:
    samples = make_samples(25)
    write_shards(samples, tmp_path / "shards", samples_per_shard=10)
    return tmp_path / "shards", samples


def test_the_index_says_what_is_there(written) -> None:
    folder, _ = written
    index = read_index(folder)
    assert [shard.samples for shard in index.shards] == [10, 10, 5]
    assert index.num_samples == 25
    assert index.image == (8, 8, 1)
    assert index.classes == 3
    for shard in index.shards:
        content = (folder / shard.name).read_bytes()
        assert len(content) == shard.bytes
        assert hashlib.sha256(content).hexdigest() == shard.sha256


def test_offsets_point_at_the_images(written) -> None:
    folder, samples = written
    index = read_index(folder)
    number = 0
    for shard in index.shards:
        content = (folder / shard.name).read_bytes()
        for offset, size, label in read_offsets(folder, shard):
            image = np.asarray(Image.open(io.BytesIO(content[offset : offset + size])))
            assert np.array_equal(image, samples[number].image[:, :, 0])
            assert label == samples[number].label
            number += 1
    assert number == len(samples)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_plain_webdataset_reads_them(written) -> None:
    folder, samples = written
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("png", "cls", "__key__")
    )
    assert len(read) == len(samples)
    for (image, label, key), sample in zip(read, samples, strict=True):
        assert np.array_equal(image, sample.image[:, :, 0])
        assert (label, key) == (sample.label, sample.key)
    gc.collect()  # here, where the warning is expected


def test_plain_tar_reads_them(written) -> None:
    folder, _ = written
    with tarfile.open(folder / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["00000.cls", "00000.png"]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, make_samples) -> None:
    hashes = {write_shards(make_samples(7), tmp_path / name).data_hash for name in ("a", "b")}
    assert len(hashes) == 1
    other = write_shards(make_samples(7, seed=1), tmp_path / "c").data_hash
    assert other not in hashes


def test_colour_images_come_back(tmp_path: Path, make_samples) -> None:
    samples = make_samples(3, shape=(4, 6, 3))
    index = write_shards(samples, tmp_path)
    assert index.image == (4, 6, 3)


def test_images_of_two_sizes_are_refused(tmp_path: Path, make_samples) -> None:
    mixed = make_samples(2) + make_samples(1, shape=(4, 4, 1))
    with pytest.raises(DataError, match=r"\(4, 4, 1\).*resize"):
        write_shards(mixed, tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path)


def _index(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / INDEX).unlink(), "has no index.json"),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), "not a shard index"),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), "not a shard index"),
    "another version": (lambda f: _index(f, lambda c: c.update(version=99)), "not a shard index"),
    "numbers are words": (
        lambda f: _index(f, lambda c: c["shards"][0].update(samples="10")),
        "not a shard index",
    ),
    "name is a number": (lambda f: _index(f, lambda c: c["shards"][0].update(name=5)), "not a shard index"),
    "negative": (lambda f: _index(f, lambda c: c["shards"][0].update(samples=-1)), "not a shard index"),
    "no shards": (lambda f: _index(f, lambda c: c.update(shards=[])), "not a shard index"),
    "nested for ever": (lambda f: (f / INDEX).write_text("[" * 100_000), "not a shard index"),
    "infinite": (lambda f: _index(f, lambda c: c.update(classes=float("inf"))), "not a shard index"),
    "shard is missing": (lambda folder: (folder / "shard-000001.tar").unlink(), "is missing"),
    "shard is cut": (lambda folder: (folder / "shard-000001.tar").write_bytes(b"x"), "has 1 bytes"),
    "path escapes": (
        lambda f: _index(f, lambda c: c["shards"][0].update(name="../shard-000000.tar")),
        "not a plain .tar name",
    ),
    "absolute path": (
        lambda f: _index(f, lambda c: c["shards"][0].update(name="/etc/passwd.tar")),
        "not a plain .tar name",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_in_one_sentence(written, fault: str) -> None:
    folder, _ = written
    damage, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        read_index(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_one_too_high_names_those_below(written) -> None:
    folder, _ = written
    with pytest.raises(DataError, match=f"did you mean {folder}"):
        read_index(folder.parent)


def test_a_file_is_no_folder(written) -> None:
    folder, _ = written
    with pytest.raises(DataError, match="is a file"):
        read_index(folder / "shard-000000.tar")


def test_a_missing_folder_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make-shards"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "offsets",
    [
        np.zeros((10, 2), np.int64),
        np.zeros((10, 3), np.float64),
        np.full((10, 3), 10**9),
        np.full((10, 3), -1),
    ],
    ids=["columns", "dtype", "beyond", "negative"],
)
def test_offsets_that_do_not_fit_are_refused(written, offsets) -> None:
    folder, _ = written
    np.save(folder / "shard-000000.index.npy", offsets)
    with pytest.raises(DataError):
        read_offsets(folder, read_index(folder).shards[0])


def test_pickled_offsets_are_not_loaded(written) -> None:
    folder, _ = written
    np.save(folder / "shard-000000.index.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_offsets(folder, read_index(folder).shards[0])
