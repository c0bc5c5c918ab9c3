"""Shards of codes: read as what was written, by people's tools too, checked, and refused where something else is needed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vaescale.data.batch import Request
from vaescale.data.code_shards import open_codes, write_codes
from vaescale.data.config import DataConfig
from vaescale.data.index import CODES
from vaescale.data.latent_shards import open_latents, write_latent_index
from vaescale.data.latents import LatentDataset
from vaescale.data.making.verifying import verify_shards
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import DataError

MAPS = np.random.default_rng(0).integers(0, 7, (10, 2, 3), dtype=np.int32)
MADE = {"kind": CODES, "codes": 7, "code_shape": [2, 3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "codes"
    shards = [
        write_codes(
            folder,
            f"shard-{number:06d}.tar",
            keys=[f"{image:04d}" for image in images],
            labels=np.array(images) % 3,
            codes=MAPS[images.start : images.stop],
        )
        for number, images in enumerate((range(4), range(4, 10)))
    ]
    write_latent_index(folder, shards, (), MADE)
    return folder


def reader(folder: Path, **changes: object) -> ShardReader:
    keys = {"train": "a", "val": "b", "image_size": (2, 3), "channels": 7, "global_batch": 2}
    return open_reader(str(folder), DataConfig.model_validate({**keys, "holds": "codes", **changes}))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_codes_are_read_as_they_were_written(folder: Path, cache: str) -> None:
    fetched = reader(folder, cache=cache).__getitems__(Request(np.array([9, 3, 4])))
    assert fetched.images.dtype == torch.int32
    np.testing.assert_array_equal(fetched.images.numpy(), MAPS[[9, 3, 4], None])
    assert fetched.labels.tolist() == [0, 0, 1]
    assert fetched.keys == ("0009", "0003", "0004")
    assert (open_codes(folder).codes, open_codes(folder).shape) == (7, (2, 3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves it open
def test_webdataset_and_the_verifier_read_them(folder: Path) -> None:
    import webdataset

    files = str(folder / "shard-{000000..000001}.tar")
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    np.testing.assert_array_equal(np.stack([sample["codes.npy"] for sample in samples]), MAPS)
    assert verify_shards(str(folder), deep=True) == (10, [])


def test_a_code_that_cannot_be_is_a_fault(folder: Path, tmp_path: Path) -> None:
    codes = MAPS.copy()
    codes[5, 1, 1] = 7
    other = tmp_path / "other"
    shard = write_codes(other, "a.tar", keys=[str(n) for n in range(10)], labels=np.full(10, -1), codes=codes)
    write_latent_index(other, [shard], (), MADE)
    fetched = reader(other).__getitems__(Request(np.arange(10), refill=False))
    assert fetched.usable.tolist() == [number != 5 for number in range(10)]
    assert "codes that are not from 0 to 6" in fetched.faults[0].words


def test_other_forms_are_refused(folder: Path, digits: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds maps \[2, 3\] of 7 codes; set data.channels=7 and data.image_size=\[2, 3\]"
    ):
        reader(folder, channels=8)
    with pytest.raises(DataError, match="holds codes, not images"):
        reader(folder, holds="images", channels=1)
    for wants_latents in (open_latents, lambda place: LatentDataset(place, global_batch=2)):
        with pytest.raises(DataError, match="holds codes, and latents with a density are needed"):
            wants_latents(folder)
    with pytest.raises(DataError, match="holds no codes"):
        reader(digits / "train")
