"""Batches: the right images in the right slots, at any world size, cached or not, with workers or without."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from vaescale.data.plan import Plan
from vaescale.data.reader import DataConfig, ShardReader, evaluation_batches, open_reader, training_batches
from vaescale.data.shards import read_index, write_shards
from vaescale.errors import DataError


@pytest.fixture
def shards(tmp_path: Path, make_samples) -> tuple[Path, np.ndarray, list[int]]:
    samples = make_samples(23, shape=(4, 4, 3))
    write_shards(samples, tmp_path / "shards", samples_per_shard=10)
    images = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    return tmp_path / "shards", images, [sample.label for sample in samples]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_samples_come_back_by_number(shards, cache) -> None:
    folder, images, labels = shards
    reader = ShardReader(read_index(folder), cache=cache)
    assert len(reader) == 23
    numbers = [22, 0, 9, 10, 0]
    read, classes = reader.__getitems__(numbers)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), images[numbers])
    assert classes.tolist() == [labels[number] for number in numbers]
    image, label = reader[19]
    assert np.array_equal(image.numpy(), images[19])
    assert int(label) == labels[19]


@pytest.mark.parametrize(
    ("cache", "workers", "world_size", "accumulation"),
    [
        *((cache, 0, n, a) for cache in ("memory", "none") for n in (1, 2, 4) for a in (1, 2)),
        ("none", 2, 2, 2),
    ],
)
def test_global_batches_do_not_depend_on_ranks_or_workers(
    shards, cache, workers, world_size, accumulation
) -> None:
    folder, images, _ = shards
    plan = Plan(np.array([10, 10, 3]), 8, seed=1, block_samples=10)
    reader = ShardReader(read_index(folder), cache=cache)
    options = {"world_size": world_size, "accumulation": accumulation, "workers": workers}
    ranks = [
        training_batches(reader, plan, steps=range(1, 5), rank=rank, **options) for rank in range(world_size)
    ]
    for step, shares in zip(range(1, 5), zip(*ranks, strict=True), strict=True):
        seen = {}
        for micro_batches in shares:
            for batch in micro_batches:
                assert batch.mask.all()
                seen.update(zip(batch.slots.tolist(), batch.images.numpy(), strict=True))
        together = np.stack([seen[slot] for slot in range(8)])
        assert np.array_equal(together, images[plan.samples(step)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 23, 100])
def test_evaluation_sees_each_sample_once(shards, world_size: int, batch: int) -> None:
    folder, images, _ = shards
    reader = ShardReader(read_index(folder))
    ranks = [
        list(evaluation_batches(reader, batch=batch, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "ranks must take equally many steps"
    numbers = []
    for one in (batch for batches in ranks for batch in batches):
        assert np.array_equal(one.images[one.mask].numpy(), images[one.slots[one.mask].numpy()])
        numbers += one.slots[one.mask].tolist()
    assert sorted(numbers) == list(range(23))


def _config(folder: Path, **changes) -> DataConfig:
    return DataConfig(
        **{"train": str(folder), "val": str(folder), "image_size": 4, "channels": 3, "global_batch": 4}
        | changes
    )


def test_the_recipe_s_shape_is_checked(shards) -> None:
    folder, _, _ = shards
    assert len(open_reader(str(folder), _config(folder))) == 23
    with pytest.raises(DataError, match=r"4x4 images, data.image_size is 8"):
        open_reader(str(folder), _config(folder, image_size=8))
    with pytest.raises(DataError, match=r"3 channels, data.channels is 1"):
        open_reader(str(folder), _config(folder, channels=1))


def _damage(folder: Path, number: int, content: bytes) -> None:
    """Overwrite the start of an image's file within its tar."""
    offset = int(np.load(folder / "shard-000000.index.npy")[number, 0])
    with (folder / "shard-000000.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(content)


def test_a_damaged_image_is_named(shards) -> None:
    folder, _, _ = shards
    _damage(folder, 2, b"not a png")
    with pytest.raises(DataError, match=r"sample 2 in shard-000000.tar at byte"):
        ShardReader(read_index(folder)).__getitems__([2])


def test_a_flipped_bit_is_noticed(shards) -> None:
    folder, _, _ = shards
    offset, size, _ = np.load(folder / "shard-000000.index.npy")[3]
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[offset + size - 20] ^= 1  # within the compressed pixels
    (folder / "shard-000000.tar").write_bytes(content)
    with pytest.raises(DataError, match="sample 3"):
        ShardReader(read_index(folder)).__getitems__([3])


def test_an_image_of_another_size_is_not_decoded(shards) -> None:
    folder, _, _ = shards
    offset = int(np.load(folder / "shard-000000.index.npy")[1, 0])
    header = bytearray((folder / "shard-000000.tar").read_bytes()[offset : offset + 33])
    header[16:20] = (9000).to_bytes(4)
    header[20:24] = (9000).to_bytes(4)
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    _damage(folder, 1, bytes(header))
    with pytest.raises(DataError, match="9000x9000 pixels, not 4x4"):
        ShardReader(read_index(folder)).__getitems__([1])
