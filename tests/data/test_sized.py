"""Images of a source without shards: what make-shards writes of them, in order, with the damaged ones named."""

import itertools
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vaescale.data.batch import Batch
from vaescale.data.forms import Pictures
from vaescale.data.making.items import Item
from vaescale.data.making.sized import Sizing, sized_batches
from vaescale.data.making.sources import open_source
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import fit
from vaescale.data.reader import ShardReader
from vaescale.data.storage import Folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of several shapes and formats in two classes, one of them cut."""
    generator = np.random.default_rng(0)
    for number in range(9):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (20 + number, 30, 3) if number % 3 else (24, 20 + number)
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        image.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    path = tmp_path / "pictures" / "cat" / "4.png"
    path.write_bytes(path.read_bytes()[:200])
    return tmp_path / "pictures"


def items_of(pictures: Path) -> list[Item]:
    return list(open_source(f"folder:{pictures}", holdout=0).splits["train"]().items)


def together(batches: list[Batch]) -> dict[str, Any]:
    fields = {name: torch.cat([getattr(one, name) for one in batches]) for name in Batch._fields[:4]}
    return {**fields, "keys": [key for one in batches for key in one.keys]}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["square", "whole", 16])
def test_images_are_those_of_written_shards(pictures: Path, tmp_path: Path, crop: Any, channels: Any) -> None:
    making = Making(size=12, crop=crop, resample="lanczos", channels=channels, skip_broken=True)
    remarks = Counter[str]()
    found = list(sized_batches(items_of(pictures), Sizing(making, 12), batch=4, remarks=remarks))
    assert [len(one.slots) for one in found] == [4, 4, 1]
    whole = together(found)
    assert whole["slots"].tolist() == list(range(9))
    (fault,) = [fault for one in found for fault in one.faults]
    assert (fault.reason, fault.number) == ("damaged", int((~whole["mask"]).nonzero()))
    assert f"{pictures}/cat/4.png: " in fault.words
    assert whole["keys"][fault.number] == f"{pictures}/cat/4.png"

    written = write_shards(items_of(pictures), tmp_path / "out", making, class_names=("cat", "dog"))
    assert len(written.skipped) == 1
    reader = ShardReader(written.shards, Folder(str(tmp_path / "out")), Pictures((channels, 12, 12)))
    stored = [reader[number] for number in range(len(reader))]
    used = whole["mask"]
    assert torch.equal(whole["images"][used], torch.cat([one.images for one in stored]))
    assert torch.equal(whole["labels"][used], torch.cat([one.labels for one in stored]))
    assert dict(remarks) == dict(written.remarks)


def test_a_recipe_that_crops_what_it_reads_is_followed(pictures: Path) -> None:
    """As the shards were made, 16 pixels, and then as the recipe reads them, the middle 12."""
    making = Making(size=16, crop="square", channels=1)
    (found,) = sized_batches(items_of(pictures), Sizing(making, 8, 12, "box"), batch=9)
    (first,) = sized_batches(items_of(pictures), Sizing(making, 16), batch=9)
    for image, larger, used in zip(found.images, first.images, found.mask.tolist(), strict=True):
        if used:
            cut = fit(larger.permute(1, 2, 0).numpy(), size=8, crop=12, resample="box")
            assert np.array_equal(image.permute(1, 2, 0).numpy(), cut)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_ranks_share_the_images(make_items, count: int) -> None:
    sizing = Sizing(Making(size=8, channels=1), 8)
    alone = together(list(sized_batches(make_items(count), sizing, batch=2)))
    shares = [
        list(sized_batches(make_items(count), sizing, batch=2, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == -(-count // 4), "both take part in each collective"
    mixed = together([one for pair in zip(*shares, strict=True) for one in pair])
    used = mixed["mask"]
    for name in ("slots", "images", "labels"):
        assert torch.equal(mixed[name][used], alone[name])


def test_a_stream_is_read_as_far_as_it_is_asked_for() -> None:
    """10,000 images in the memory of a few: the items are made when they are read, and not kept."""
    image = np.zeros((64, 64, 3), np.uint8)
    read = itertools.count()
    items = (Item(str(next(read)), image.copy(), -1) for _ in range(10_000))
    batches = sized_batches(items, Sizing(Making(size=32, crop="square", channels=3), 32), batch=50)
    next(batches)
    assert next(read) == 50
    tracemalloc.start()
    for _ in range(10):
        next(batches)
    first = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for _ in range(20):
        next(batches)
    later = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert later < 1.2 * first
    batches.close()
