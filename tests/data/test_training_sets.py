"""Several training sets: read by number, classes matched by name, damaged samples replaced within their set, refusals with counts."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vaescale.data.batch import Batch, Request
from vaescale.data.config import DataConfig
from vaescale.data.loader import evaluation_batches, shard_batches, training_batches, working_set_bytes
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.mixed_plan import MixedPlan
from vaescale.data.plan import Plan
from vaescale.data.training_sets import describe_mixture, open_mixture, open_training, training_plan
from vaescale.errors import DataError

A, B = 23, 9  # images of the two sets


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a set whose image n has the value `base` + n and the class n % `classes`."""

    def write_set(name: str, number: int, base: int, *, channels: int = 1, **options: Any) -> str:
        classes, names = options.get("classes", 3), options.get("names", ())
        items = [
            Item(f"{n:05d}", np.full((4, 4, channels), base + n, np.uint8), n % classes if classes else -1)
            for n in range(number)
        ]
        for item in items[: options.get("unlabelled", 0)]:
            items[items.index(item)] = item._replace(label=-1)
        write_shards(items, tmp_path / name, Making(shard_samples=5, encoding="npy"), class_names=names)
        return str(tmp_path / name)

    return write_set


@pytest.fixture
def two(write) -> list[dict[str, Any]]:
    return [
        {"path": write("a", A, 0, names=("x", "y", "z")), "weight": 1},
        {"path": write("b", B, 100, names=("z", "w", "x")), "weight": 3},
    ]


def config(train: Any, **changes: Any) -> DataConfig:
    first = train if isinstance(train, str) else train[0]
    val = first if isinstance(first, str) else first["path"]
    return DataConfig(
        **{"train": train, "val": val, "image_size": 4, "global_batch": 8, "cache": "memory", **changes}
    )


def opened(train: Any, names: tuple[str, ...] = (), seed: int = 0, **changes: Any):
    of_data = config(train, **changes)
    reader = open_training(of_data, names)
    return reader, training_plan(reader, of_data, seed)


def batches(reader, plan, steps: range, **changes: Any) -> list[Batch]:
    options = {"rank": 0, "world_size": 1, "accumulation": 1, "workers": 0}
    return [
        batch
        for step in training_batches(reader, plan, steps=steps, **{**options, **changes})
        for batch in step
    ]


def values(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_samples_of_all_sets_are_numbered_through(two, cache: str) -> None:
    reader, plan = opened(two, cache=cache)
    assert len(reader) == A + B == plan.num_samples
    numbers = np.array([22, 23, 0, 31, 5])
    fetched = reader.__getitems__(Request(numbers))
    assert fetched.images[:, 0, 3, 3].tolist() == [22, 100, 0, 108, 5]
    assert fetched.keys == ("00022", "00000", "00000", "00008", "00005")
    names = [reader.index.class_names[label] for label in fetched.labels.tolist()]
    assert names == ["y", "z", "x", "x", "z"], "by the names of each set"
    assert [key.rsplit("/", 2)[1] for key in reader.keys_of(numbers)] == ["a", "b", "a", "b", "a"]
    assert reader.shards_of(numbers).tolist() == [4, 5, 0, 6, 1]
    assert reader.labels().tolist() == reader.__getitems__(Request(np.arange(A + B))).labels.tolist()


def test_held_out_classes_keep_their_numbers_and_new_ones_follow(two, capsys) -> None:
    reader, _ = opened(two, names=("w", "x"))
    assert reader.index.class_names == ("w", "x", "y", "z")
    assert "classes are matched by name: 3 of " in capsys.readouterr().err


def test_a_list_of_one_set_is_that_set(two) -> None:
    one, plain = ([{"path": two[0]["path"], "weight": 5}], two[0]["path"])
    plans = [opened(train)[1] for train in (one, plain)]
    assert isinstance(plans[0], Plan)
    assert plans[0].hash == plans[1].hash
    idle = [two[0], {**two[1], "weight": 0}]
    assert opened(idle)[1].hash == plans[0].hash, "a set of weight 0 is not read"


def test_without_weights_each_image_is_drawn_equally_often(two) -> None:
    reader, plan = opened([one["path"] for one in two])
    assert isinstance(plan, MixedPlan)
    assert plan.passes() == [1.0, 1.0]
    assert len(batches(reader, plan, range(4))) == 4


def test_batches_have_the_shares_and_no_rank_changes_them(two) -> None:
    reader, plan = opened(two)
    whole = batches(reader, plan, range(12))
    for batch in whole:
        assert sum(value >= 100 for value in values(batch)) == 6
    for world in (2, 4):
        parts = [batches(reader, plan, range(12), rank=rank, world_size=world) for rank in range(world)]
        for number, batch in enumerate(whole):
            shared = torch.cat([part[number].images for part in parts])
            assert torch.equal(shared, batch.images)
            assert torch.cat([part[number].labels for part in parts]).tolist() == batch.labels.tolist()


def test_changes_and_flips_are_by_slot_and_evaluation_has_none(two) -> None:
    changes = {"flip": True, "augment": {"shift": 1, "padding": "zero", "jitter": {"brightness": 0.5}}}
    reader, plan = opened(two, **changes)
    of_data = config(two, **changes)
    options = {"flip": True, "augment": of_data.augment}
    whole = batches(reader, plan, range(3), **options)
    resumed = batches(reader, plan, range(2, 3), rank=1, world_size=2, **options)
    assert torch.equal(resumed[0].images, whole[2].images[4:])
    assert not torch.equal(whole[0].images, batches(reader, plan, range(1))[0].images)
    measured = next(evaluation_batches(open_mixture(of_data, 0), batch=8, rank=0, world_size=1))
    assert all(len(image.unique()) == 1 for image in measured.images), "stored images have one value"


def test_what_measures_the_training_images_reads_the_mixture(two, capsys) -> None:
    of_data = config(two)
    reader = open_mixture(of_data, 0)
    assert "an epoch of the mixture, 32 images: " in capsys.readouterr().err
    (batch,) = evaluation_batches(reader, batch=32, rank=0, world_size=1)
    assert len(reader) == 32
    assert sum(value >= 100 for value in values(batch)) == 24
    assert len(set(batch.keys)) == 32, "an image that comes again has another key"
    assert reader.labels().tolist() == batch.labels.tolist()
    by_shard = [part for _, part in shard_batches(reader, range(len(reader.index.shards)), batch=4)]
    assert [value for part in by_shard for value in values(part)] == values(batch)
    assert reader.index.num_samples == 32
    sent = copy.deepcopy(reader)  # as it is sent to a process that reads
    assert torch.equal(sent.__getitems__(Request(np.arange(32))).images, batch.images)
    other = open_mixture(config([two[0], {**two[1], "weight": 1}]), 0)
    assert other.index.data_hash != reader.index.data_hash
    assert len(open_mixture(config(two[0]["path"]), 0)) == A


def test_the_mixture_is_described(two) -> None:
    reader, plan = opened(two, balance="class")
    described = describe_mixture(reader, plan)
    a, b = described["sets"]
    assert (a["images"], a["share"], a["passes_per_epoch"]) == (A, 0.25, round(8 / A, 4))
    assert (b["images"], b["share"], b["passes_per_epoch"]) == (B, 0.75, round(24 / B, 4))
    assert b["classes"] == {
        name: {
            "images": 3,
            "share": pytest.approx(1 / 3, abs=1e-6),
            "passes_per_epoch": pytest.approx(8 / 3, abs=1e-4),
        }
        for name in ("z", "w", "x")
    }
    assert "its 3 classes of 7 to 8 images balanced" in described["words"]
    reader.readers[0].index = reader.readers[0].index._replace(place="https://me:secret@host/a")
    assert "https://***@host/a 0.348 passes" in describe_mixture(reader, plan)["words"], (
        "it is saved as a tag"
    )
    assert reader.keys_of(np.array([3])) == ["https://***@host/a/shard-000000.tar:00003"]


def test_balance_draws_classes_equally_or_by_a_power(write) -> None:
    train = write("uneven", 40, 0, classes=40)
    shutil.rmtree(train)
    items = [Item(f"{n:05d}", np.full((4, 4, 1), n, np.uint8), int(n >= 4)) for n in range(40)]
    write_shards(items, Path(train), Making(shard_samples=7, encoding="npy"))
    for balance, rare in (("class", 100), ({"power": 0.5}, 50), ({"power": 1}, 20)):
        reader, plan = opened(train, balance=balance)
        drawn = [label for batch in batches(reader, plan, range(25)) for label in batch.labels.tolist()]
        assert drawn.count(0) == rare
        assert working_set_bytes(reader.index, plan, ranks_here=1, world_size=1) == reader.index.num_bytes


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_damaged_sample_is_replaced_by_one_of_its_set(two, cache: str) -> None:
    tar = Path(two[1]["path"]) / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[:] = b"\0" * len(content)
    tar.write_bytes(content)
    reader, plan = opened(two, cache=cache)
    fetched = reader.__getitems__(Request(np.array([0, A + 6, A + 1])))
    assert fetched.usable.tolist() == [True, True, True]
    assert [value >= 100 for value in fetched.images[:, 0, 0, 0].tolist()] == [False, True, True]
    (fault,) = fetched.faults
    assert (fault.number, fault.reason) == (A + 6, "changed")
    assert "/b/shard-000001.tar" in fault.words
    counted = [fault.number for batch in batches(reader, plan, range(4)) for fault in batch.faults]
    assert counted
    assert all(number >= A + 5 for number in counted)
    measured = open_mixture(config(two, cache=cache), 0)
    (batch,) = evaluation_batches(measured, batch=32, rank=0, world_size=1)
    faulty = sorted(fault.number for fault in batch.faults)
    assert faulty == torch.nonzero(~batch.mask).flatten().tolist(), "numbered by place in the epoch"


def test_sets_that_do_not_fit_are_refused_with_counts(two, write) -> None:
    rgb = {"path": write("rgb", 5, 0, channels=3), "weight": 1}
    with pytest.raises(DataError, match=r"mixes 23 images of 1 channels \(.*a\) with 5 of 3 \(.*rgb\)"):
        opened([two[0], rgb], channels=3)
    unnamed = {"path": write("unnamed", 5, 0), "weight": 1}
    with pytest.raises(DataError, match=r"unnamed numbers its classes up to 2 and names none, .*a names 3"):
        opened([two[0], unnamed])
    twice = {"path": write("twice", 5, 0, names=("x", "x", "y")), "weight": 1}
    with pytest.raises(DataError, match=r"twice has 2 classes of the name 'x', so its 3 classes"):
        opened([two[0], twice])
    some = {"path": write("some", 7, 0, unlabelled=2), "weight": 1}
    with pytest.raises(
        DataError, match=r"needs the class of each image, and 2 of 7 images of .*some have none"
    ):
        opened([some], balance="class")
    with pytest.raises(DataError, match=r"global_batch \(=64\) exceeds the 32 training samples"):
        opened(two, global_batch=64)


def test_sets_without_any_class_mix(two, write) -> None:
    none = {"path": write("none", 6, 200, classes=0), "weight": 1}
    reader, _ = opened([two[0], none])
    assert reader.labels()[A:].tolist() == [-1] * 6
    assert reader.index.class_names == ("x", "y", "z")
