"""Images of a source, brought to one size as `make-shards` does and not written: a stream of batches in the source's order."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from vaescale.config import Dtype, Size, sides
from vaescale.data.batch import Batch, Fault
from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Item, Packed, Place, name_of
from vaescale.data.making.storing import Making, prepare, values_of
from vaescale.data.pictures import PictureFault, Values, fit
from vaescale.system.host import cores

AT_ONCE = 32  # images of a stream that are held before they are decoded: files may have megabytes


class Sizing(NamedTuple):
    """How images are brought to the size of a run: as its shards were made, then cut as its recipe reads them.

    making: the crop, the filter, the channels and the first size, or None for the images' own. size: of the result. crop: of the
    reading, None where `making` gives the size already.
    """

    making: Making
    size: Size
    crop: Crop | None = None
    resample: Filter = "bicubic"

    def apply(self, item: Item) -> tuple[Values, list[str]]:
        """An item's image [H, W, C], and its remarks (`remarks.py`). Raises PictureFault."""
        prepared = prepare(item, self.making)
        return (
            fit(
                values_of(prepared.content, self.making.dtype),
                size=self.size,
                crop=self.crop,
                resample=self.resample,
            ),
            prepared.remarks,
        )


class _Sized(NamedTuple):
    """An item after sizing. image: None where it has a fault, its reason and sentence."""

    item: Item
    image: Values | None
    remarks: list[str]
    fault: tuple[str, str] = ("", "")


def sized_batches(
    items: Iterable[Item],
    sizing: Sizing,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    remarks: Counter[str] | None = None,
) -> Iterator[Batch]:
    """Yield this rank's share of all items in order, in batches of up to `batch`; all ranks get equally many batches.

    The slots are the items' numbers. Images that cannot be used are masked, and are among the faults. remarks: counts of what is
    remarkable about the images, updated. A rank without an item in the last batches gets one that is masked.
    """
    channels = sizing.making.channels
    assert channels is not None, "images of one batch have equally many channels"
    walk, start = iter(items), 0
    with ThreadPoolExecutor(cores()) as pool:
        while True:
            count, results, waiting = 0, list[_Sized](), list[Item]()
            for item in islice(walk, batch * world_size):
                if count // batch == rank:
                    waiting.append(item)
                if len(waiting) == AT_ONCE:
                    results += pool.map(_resized(sizing), waiting)
                    waiting = []
                count += 1
            results += pool.map(_resized(sizing), waiting)
            if not count:
                return
            if remarks is not None:
                remarks.update(remark for one in results for remark in one.remarks)
            shape = (channels, *sides(sizing.size))
            yield _batch(results, start + rank * batch, shape, sizing.making.dtype)
            start += count


def _resized(sizing: Sizing) -> Callable[[Item], _Sized]:
    """The work on one item, for a pool of threads: decoding releases the interpreter's lock."""

    def work(item: Item) -> _Sized:
        try:
            return _Sized(item, *sizing.apply(item))
        except PictureFault as error:
            return _Sized(item, None, [], (error.reason, f"{name_of(item)}: {error}"))

    return work


def _batch(results: list[_Sized], first: int, shape: tuple[int, int, int], dtype: Dtype) -> Batch:
    """The batch of some items. first: the number of the first one."""
    size = max(1, len(results))
    images, labels = np.zeros((size, *shape), dtype), np.full(size, -1, np.int64)
    mask, faults = np.zeros(size, dtype=bool), []
    for row, one in enumerate(results):
        labels[row] = one.item.label
        if one.image is None:
            faults.append(Fault(first + row, *one.fault))
        else:
            images[row], mask[row] = one.image.transpose(2, 0, 1), True
    keys = tuple(_name(one.item) for one in results) or ("",)
    numbers = torch.arange(first, first + size)
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        numbers,
        torch.from_numpy(mask),
        keys,
        tuple(faults),
    )


def _name(item: Item) -> str:
    """The path of an image that has a file of its own, or its key."""
    own_file = isinstance(item.content, Packed) or (
        isinstance(item.content, Place) and item.content.offset == 0 and item.content.bytes == -1
    )
    return name_of(item) if own_file else item.key
