"""Batches: the right images in the right slots at any world size; what cannot be used is refilled alike everywhere."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaescale.data.batch import Batch, Request
from vaescale.data.config import DataConfig
from vaescale.data.forms import Pictures
from vaescale.data.index import INDEX, parse_entries, parse_index
from vaescale.data.loader import evaluation_batches, training_batches
from vaescale.data.making.indexing import index_shards
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import encode, fit
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.storage import Folder
from vaescale.errors import DataError

# Three workers on two cores are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
CACHES = ("memory", "none")


def config(folder: Path, **changes: Any) -> DataConfig:
    values = {"train": str(folder), "val": str(folder), "image_size": 4, "channels": 3, "global_batch": 4}
    return DataConfig(**{**values, **changes})


def reader(folder: Path, **changes: Any) -> ShardReader:
    return open_reader(str(folder), config(folder, **changes))


def plan_of(opened: ShardReader, global_batch: int, **options: Any) -> Plan:
    return Plan(opened.index.shards.samples, global_batch, 1, **options)


def batches(opened: ShardReader, plan: Plan, steps: range, **changes: Any) -> list[list[Batch]]:
    options = {"rank": 0, "world_size": 1, "accumulation": 1, "workers": 0}
    return list(training_batches(opened, plan, steps=steps, **{**options, **changes}))


@pytest.fixture
def shards(tmp_path: Path, make_items) -> tuple[Path, np.ndarray, list[int]]:
    items = make_items(23, shape=(4, 4, 3))
    write_shards(items, tmp_path / "shards", Making(shard_samples=10, encoding="png"))
    images = np.stack([item.content for item in items]).transpose(0, 3, 1, 2)
    return tmp_path / "shards", images, [item.label for item in items]


@pytest.mark.parametrize("cache", CACHES)
def test_samples_come_back_by_number(shards, cache) -> None:
    folder, images, labels = shards
    opened = reader(folder, cache=cache)
    assert len(opened) == 23
    numbers = np.array([22, 0, 9, 10, 0])
    got = opened.__getitems__(Request(numbers))
    assert got.images.dtype == torch.uint8
    assert got.images.is_contiguous()
    assert np.array_equal(got.images.numpy(), images[numbers])
    assert got.labels.tolist() == [labels[number] for number in numbers]
    assert got.keys == tuple(f"{number:05d}" for number in numbers)
    assert got.usable.all()
    assert got.faults == ()
    assert np.array_equal(opened[19].images[0].numpy(), images[19])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("encoding", ["npy", "webp", "jpg"])
def test_every_encoding_is_read(tmp_path: Path, make_items, encoding: str, cache: str) -> None:
    items = make_items(7, shape=(16, 16, 3))
    write_shards(items, tmp_path / "x", Making(encoding=encoding))
    got = reader(tmp_path / "x", image_size=16, cache=cache).__getitems__(Request(np.arange(7)))
    expected = np.stack([item.content for item in items]).transpose(0, 3, 1, 2)
    if encoding == "jpg":
        files = [encode(item.content, "jpg") for item in items]
        expected = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files]).transpose(0, 3, 1, 2)
    assert np.array_equal(got.images.numpy(), expected)


GRID = [(n, workers, a) for n in (1, 2, 3, 4, 6, 8) for workers in (0, 1, 3) for a in (1, 2) if not (a == 2 and workers == 1)]  # fmt: skip


@pytest.mark.parametrize(("world_size", "workers", "accumulation"), GRID)
def test_global_batches_do_not_depend_on_ranks_or_workers(shards, world_size, workers, accumulation) -> None:
    folder, images, labels = shards
    opened = reader(folder)
    global_batch = 16 if world_size in (4, 8) else 12
    plan = plan_of(opened, global_batch, block_samples=10)
    assert plan.steps_per_epoch == 1, "the steps below lie in two epochs"
    ranks = [
        batches(
            opened,
            plan,
            range(1, 3),
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            workers=workers,
        )
        for rank in range(world_size)
    ]
    for place, step in enumerate(range(1, 3)):
        seen: dict[int, tuple[np.ndarray, int, str]] = {}
        for batch in (batch for rank in ranks for batch in rank[place]):
            assert len(batch.slots) == global_batch // world_size // accumulation
            assert batch.mask.all()
            values = zip(batch.images.numpy(), batch.labels.tolist(), batch.keys, strict=True)
            seen.update(zip(batch.slots.tolist(), values, strict=True))
        assert sorted(seen) == list(range(global_batch)), "no slot twice, none missing"
        numbers = plan.samples(step)
        assert np.array_equal(np.stack([seen[slot][0] for slot in range(global_batch)]), images[numbers])
        assert [seen[slot][1:] for slot in range(global_batch)] == [(labels[n], f"{n:05d}") for n in numbers]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 4)), min_size=1, max_size=5),
    cache=st.sampled_from(CACHES),
)
def test_changing_the_world_size_in_mid_epoch_loses_and_repeats_nothing(shards, cuts, cache) -> None:
    """Whatever the sequence of starts, the global batches are those of one uninterrupted process."""
    folder, images, _ = shards
    opened = reader(folder, cache=cache)
    plan = plan_of(opened, 12, block_samples=10)
    step = 0
    for world_size, steps in cuts:
        span = range(step, step + steps)
        ranks = [batches(opened, plan, span, rank=rank, world_size=world_size) for rank in range(world_size)]
        for place, number in enumerate(span):
            together = np.concatenate([rank[place][0].images.numpy() for rank in ranks])
            assert np.array_equal(together, images[plan.samples(number)])
        step += steps


@pytest.mark.parametrize("cache", CACHES)
def test_half_of_the_images_are_mirrored_anew_each_epoch(tmp_path: Path, make_items, cache: str) -> None:
    items = make_items(400, shape=(4, 4, 1))
    write_shards(items, tmp_path / "x", Making(shard_samples=100))
    opened = reader(tmp_path / "x", channels=1, cache=cache)
    originals = np.stack([item.content for item in items]).transpose(0, 3, 1, 2)
    plan = plan_of(opened, 100)
    mirrored = np.zeros((2, 400), bool)
    for step, (batch,) in enumerate(batches(opened, plan, range(8), flip=True)):
        for number, image in zip(plan.samples(step), batch.images.numpy(), strict=True):
            flipped = np.array_equal(image, originals[number][:, :, ::-1])
            assert flipped or np.array_equal(image, originals[number])
            mirrored[plan.epoch(step), number] = flipped
    assert np.all(np.abs(mirrored.mean(1) - 0.5) < 0.1)
    assert 0.4 < (mirrored[0] != mirrored[1]).mean() < 0.6, "an epoch's coins do not depend on another's"
    halves = [batches(opened, plan, range(4, 8), flip=True, rank=rank, world_size=2) for rank in (0, 1)]
    again = np.concatenate([halves[rank][0][0].images.numpy() for rank in (0, 1)])
    assert np.array_equal(again, batches(opened, plan, range(4, 5), flip=True)[0][0].images.numpy())
    assert np.array_equal(opened.__getitems__(Request(np.arange(400))).images.numpy(), originals), (
        "the cache stays"
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 23, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_once(shards, world_size: int, batch: int, workers: int) -> None:
    folder, images, _ = shards
    opened = reader(folder)
    ranks = [
        list(evaluation_batches(opened, batch=batch, rank=r, world_size=world_size, workers=workers))
        for r in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in ranks}) == 1, "ranks must take equally many steps"
    numbers = []
    for one in (one for of_rank in ranks for one in of_rank):
        assert np.array_equal(one.images[one.mask].numpy(), images[one.slots[one.mask].numpy()])
        numbers += one.slots[one.mask].tolist()
    assert sorted(numbers) == list(range(23))


def test_the_recipe_s_shape_is_checked(shards) -> None:
    folder, _, _ = shards
    assert len(reader(folder)) == 23
    with pytest.raises(DataError, match=r"4x4 images, data.image_size is 8; .*data.crop=square"):
        reader(folder, image_size=8)
    with pytest.raises(DataError, match=r"3 channels, data.channels is 1"):
        reader(folder, channels=1)
    with pytest.raises(DataError, match=r"data.crop \(=5\) exceeds the 4x4 images"):
        reader(folder, image_size=8, crop=5)


def test_images_are_cut_to_size_while_reading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (12 + i, 10 + 2 * i, 3), dtype=np.uint8) for i in range(5)]
    write_shards([Item(f"{i}", image, -1) for i, image in enumerate(images)], tmp_path / "x")
    with pytest.raises(
        DataError, match=r"images of several sizes or channels; set data.crop=square.*--size 8 --channels 3"
    ):
        reader(tmp_path / "x", image_size=8)
    for crop in ("square", "whole", 9):
        got = reader(tmp_path / "x", image_size=8, crop=crop, resample="box").__getitems__(
            Request(np.arange(5))
        )
        expected = [fit(image, size=8, crop=crop, resample="box") for image in images]
        assert np.array_equal(got.images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
        assert got.labels.tolist() == [-1] * 5


def _entry(folder: Path, number: int) -> tuple[int, int]:
    shard = parse_index((folder / INDEX).read_bytes(), "").shards[0]
    entry = parse_entries((folder / shard.entries_name).read_bytes(), shard, "")[number]
    return int(entry["offset"]), int(entry["bytes"])


def damage(folder: Path, *numbers: int) -> None:
    """Change a byte in the middle of images of the first shard."""
    for number in numbers:
        offset, size = _entry(folder, number)
        with (folder / "shard-000000.tar").open("r+b") as tar:
            tar.seek(offset + size // 2)
            byte = tar.read(1)[0]
            tar.seek(offset + size // 2)
            tar.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("encoding", ["npy", "png", "jpg", "webp"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_changed_byte_is_always_noticed(tmp_path: Path, make_items, encoding: str, cache: str) -> None:
    """Most changed bytes of a JPEG decode without a word, and all of an npy's."""
    write_shards(make_items(12, shape=(8, 8, 3)), tmp_path / "x", Making(encoding=encoding))
    damage(tmp_path / "x", 3)
    opened = reader(tmp_path / "x", image_size=8, cache=cache)
    got = opened.__getitems__(Request(np.array([2, 3]), refill=False))
    assert got.usable.tolist() == [True, False]
    (fault,) = got.faults
    assert (fault.number, fault.reason) == (3, "changed")
    assert (
        f"x/shard-000000.tar member '00003' at byte {_entry(tmp_path / 'x', 3)[0]}: its bytes" in fault.words
    )


@pytest.mark.parametrize("cache", CACHES)
def test_a_slot_is_refilled_by_the_next_usable_sample_with_its_class_and_key(shards, cache) -> None:
    folder, images, labels = shards
    damage(folder, 3, 4)
    opened = reader(folder, cache=cache)
    got = opened.__getitems__(Request(np.array([2, 3, 4, 5])))
    assert np.array_equal(got.images.numpy(), images[[2, 5, 5, 5]])
    assert got.keys == ("00002", "00005", "00005", "00005")
    assert got.labels.tolist() == [labels[n] for n in (2, 5, 5, 5)]
    assert [fault.number for fault in got.faults] == [3, 4]
    assert got.usable.all()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 2), (1, 3)])
@pytest.mark.parametrize("cache", CACHES)
def test_refilled_batches_are_the_same_at_every_world_size(shards, world_size, workers, cache) -> None:
    folder, images, _ = shards
    damage(folder, 0, 5, 9)
    opened = reader(folder, cache=cache)
    plan = plan_of(opened, 8)
    taken = np.arange(23)
    taken[[0, 5, 9]] = 1, 6, 10
    ranks = [
        batches(opened, plan, range(4), rank=r, world_size=world_size, workers=workers)
        for r in range(world_size)
    ]
    for step in range(4):
        together = np.concatenate([rank[step][0].images.numpy() for rank in ranks])
        assert np.array_equal(together, images[taken[plan.samples(step)]])
        faults = sorted(fault.number for rank in ranks for fault in rank[step][0].faults)
        assert faults == sorted(set(plan.samples(step).tolist()) & {0, 5, 9})


def test_evaluation_masks_what_cannot_be_used(shards) -> None:
    folder, images, _ = shards
    damage(folder, 0, 5)
    for cache in CACHES:
        opened = reader(folder, cache=cache)
        masked = opened.__getitems__(Request(np.array([5]), refill=False))
        assert (masked.keys, masked.labels.tolist(), int(masked.images.sum())) == (("00005",), [2], 0)
        got = [b for r in range(2) for b in evaluation_batches(opened, batch=10, rank=r, world_size=2)]
        numbers = [n for b in got for n in b.slots[b.mask].tolist()]
        assert sorted(numbers) == [n for n in range(23) if n not in (0, 5)]
        assert sorted(fault.number for b in got for fault in b.faults) == [0, 5]
        for b in got:
            assert np.array_equal(b.images[b.mask].numpy(), images[b.slots[b.mask].numpy()])


def test_a_last_sample_that_cannot_be_used_is_counted_once(tmp_path: Path, make_items) -> None:
    write_shards(make_items(5, shape=(4, 4, 3)), tmp_path / "x")
    damage(tmp_path / "x", 4)
    got = [
        b for r in range(4) for b in evaluation_batches(reader(tmp_path / "x"), batch=8, rank=r, world_size=4)
    ]
    assert [fault.number for b in got for fault in b.faults] == [4]


@pytest.mark.parametrize("cache", CACHES)
def test_when_nothing_can_be_used_it_says_so(shards, cache) -> None:
    folder, _, _ = shards
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes(len(content)))
    opened = reader(folder, cache=cache)
    with pytest.raises(DataError, match=r"and none of 2[0-9] others can be used; `vaescale verify-shards"):
        opened.__getitems__(Request(np.array([0])))


STRANGE = {
    "colour": lambda: encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "png"),
    "damaged": lambda: encode(np.arange(16, dtype=np.uint8).reshape(4, 4, 1), "png")[:-30],
    "shape": lambda: encode(np.zeros((5, 4, 1), np.uint8), "png"),
    "transparency": lambda: _png(Image.new("RGBA", (4, 4), (1, 1, 1, 7))),
}


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("reason", STRANGE)
@pytest.mark.parametrize("cache", CACHES)
def test_strange_images_of_foreign_tars_are_counted_by_reason(
    tmp_path: Path, reason: str, cache: str
) -> None:
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for number in range(6):
            content = (
                STRANGE[reason]() if number == 2 else encode(np.full((4, 4, 1), number, np.uint8), "png")
            )
            tar.write({"__key__": str(number), "png": content})
    index_shards(tmp_path)
    index = parse_index((tmp_path / INDEX).read_bytes(), str(tmp_path))
    opened = ShardReader(index, Folder(str(tmp_path)), Pictures((1, 4, 4)), cache=cache)
    got = opened.__getitems__(Request(np.array([1, 2])))
    assert got.images[:, 0, 0, 0].tolist() == [1, 3]
    assert got.keys == ("1", "3")
    (fault,) = got.faults
    assert fault.reason == reason, fault


def test_a_shard_cut_during_training_is_noticed(shards) -> None:
    folder, images, _ = shards
    opened = reader(folder)
    opened.__getitems__(Request(np.array([0])))
    with (folder / "shard-000000.tar").open("r+b") as tar:
        tar.truncate(_entry(folder, 5)[0] + 10)
    got = opened.__getitems__(Request(np.arange(10)))
    assert {fault.reason for fault in got.faults} == {"changed"}
    assert [fault.number for fault in got.faults] == [5, 6, 7, 8, 9]
    assert np.array_equal(got.images.numpy(), images[[0, 1, 2, 3, 4, 10, 10, 10, 10, 10]])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), "holds tars without index.json; .*--index-only"),
    "shard is missing": (lambda f: (f / "shard-000001.tar").unlink(), "shard .*000001.tar is missing"),
    "shard is cut": (lambda f: (f / "shard-000001.tar").write_bytes(b"x"), "has 1 bytes, its index says"),
    "entries are missing": (lambda f: (f / "shard-000001.index.npy").unlink(), "is missing"),
    "another set's entries": (
        lambda f: (f / "shard-000001.index.npy").write_bytes(
            (f / "shard-000000.index.npy").read_bytes()[::-1]
        ),
        "not the one",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_at_the_start_are_one_sentence(shards, name: str) -> None:
    folder, _, _ = shards
    change, words = FAULTS[name]
    change(folder)
    with pytest.raises(DataError, match=words) as caught:
        reader(folder).__getitems__(Request(np.arange(23)))
    assert "\n" not in str(caught.value)


def test_places_that_hold_no_data_name_what_helps(shards, tmp_path: Path) -> None:
    folder, _, _ = shards
    with pytest.raises(DataError, match=f"did you mean {folder}"):
        reader(folder.parent)
    with pytest.raises(DataError, match="is a file"):
        reader(folder / "shard-000000.tar")
    with pytest.raises(DataError, match="make-shards"):
        reader(tmp_path / "nowhere")


def test_a_worker_s_fault_is_one_sentence(shards) -> None:
    folder, _, _ = shards
    opened = reader(folder)
    (folder / "shard-000001.index.npy").unlink()
    with pytest.raises(DataError, match=r"^\S*shard-000001.index.npy is missing") as caught:
        batches(opened, plan_of(opened, 23), range(1), workers=2)
    assert "\n" not in str(caught.value)


def test_more_readers_than_samples(tmp_path: Path, make_items) -> None:
    """4 ranks with 3 workers each over 8 samples in 2 shards."""
    items = make_items(8, shape=(4, 4, 3))
    write_shards(items, tmp_path / "x", Making(shard_samples=4))
    opened = reader(tmp_path / "x")
    plan = plan_of(opened, 8)
    seen = [batches(opened, plan, range(2), rank=rank, world_size=4, workers=3) for rank in range(4)]
    for step in range(2):
        keys = [key for rank in seen for key in rank[step][0].keys]
        assert sorted(keys) == sorted(item.key for item in items)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("cache", "workers"), [("memory", 0), ("none", 0), ("none", 1)])
def test_batches_are_pinned_for_a_gpu(shards, cache: str, workers: int) -> None:
    folder, images, _ = shards
    opened = reader(folder, cache=cache)
    plan = plan_of(opened, 8)
    for step, (batch,) in enumerate(batches(opened, plan, range(2), workers=workers)):
        assert batch.images.is_pinned()
        assert isinstance(batch.keys, tuple)
        arrived = batch.images.to("cuda", non_blocking=True).cpu().numpy()
        assert np.array_equal(arrived, images[plan.samples(step)])


def test_a_set_that_does_not_fit_into_memory_is_refused(shards, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**12))
    with pytest.raises(
        DataError, match=r"data.cache=memory needs 1104 bytes in each of \d+ processes, \d+ are free"
    ):
        reader(shards[0], cache="memory")


def test_many_shards_leave_few_files_open(tmp_path: Path, make_items) -> None:
    write_shards(make_items(300, shape=(4, 4, 3)), tmp_path / "x", Making(shard_samples=1))
    opened = reader(tmp_path / "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened.__getitems__(Request(np.arange(300)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 128
    del opened
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
