"""From shards to uint8 batches: read by (shard, offset), under an ordinary torch DataLoader.

Images leave as uint8 [B, C, H, W]; scaling to [0, 1] happens on the device. With `cache: memory` a small set is
decoded once per process and batches are gathered from it, which needs no workers.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaescale.config import Config
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.shards import ShardIndex, read_index, read_offsets
from vaescale.errors import DataError

OPEN_SHARDS = 128


class DataConfig(Config):
    """Where the images are and how they are batched."""

    train: str = Field(description="folder of training shards")
    val: str = Field(description="folder of held-out shards")
    image_size: int = Field(gt=0, description="height and width of the images in pixels")
    channels: Literal[1, 3] = Field(default=1, description="1: grey, 3: RGB")
    global_batch: int = Field(gt=0, description="images per optimizer step, over all processes")
    cache: Literal["memory", "none"] = "none"
    workers: int = Field(
        default=2, ge=0, description="reading processes per rank; none are needed with cache: memory"
    )


class Batch(NamedTuple):
    """images uint8 [B, C, H, W]; labels int64 [B] (-1: none); slots int64 [B]; mask bool [B], false for padding.

    In training the slots count within the global batch, in evaluation they are the samples' own numbers.
    """

    images: Tensor
    labels: Tensor
    slots: Tensor
    mask: Tensor


class ShardReader(Dataset[tuple[Tensor, Tensor]]):
    """Samples of a folder of shards by number. Raises DataError for images that are not what the recipe says."""

    def __init__(self, index: ShardIndex, *, cache: Literal["memory", "none"] = "none") -> None:
        self.index = index
        self._starts = np.cumsum([0] + [shard.samples for shard in index.shards])
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._memory = self._decode_all() if cache == "memory" else None

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([number])
        return images[0], labels[0]

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Uint8 [B, C, H, W] and int64 [B]: the DataLoader fetches whole batches through this."""
        if self._memory is not None:
            images, labels = self._memory
            return images[numbers], labels[numbers]
        decoded = [self._decode(number) for number in numbers]
        images = torch.from_numpy(np.stack([image for image, _ in decoded])).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor([label for _, label in decoded])

    def _decode_all(self) -> tuple[Tensor, Tensor]:
        self._memory = None
        return self.__getitems__(list(range(len(self))))

    def _decode(self, number: int) -> tuple[NDArray[np.uint8], int]:
        shard_number = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard = self.index.shards[shard_number]
        if shard_number not in self._offsets:
            self._offsets[shard_number] = read_offsets(self.index.folder, shard)
        offset, size, label = self._offsets[shard_number][number - self._starts[shard_number]].tolist()
        try:
            content = os.pread(self._descriptor(shard_number), size, offset)
        except OSError as error:
            raise DataError(f"{self.index.folder / shard.name} cannot be read: {error.strerror}") from error
        try:
            # Only the formats that shards hold: Pillow must not guess among its dozens of decoders.
            with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
                height, width, _ = self.index.image
                if picture.size != (width, height):  # from the header, before anything is decoded
                    raise ValueError(f"{picture.height}x{picture.width} pixels, not {height}x{width}")
                image = np.asarray(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"sample {number} in {shard.name} at byte {offset} does not decode ({error}); write the shards again"
            ) from error
        image = image[:, :, None] if image.ndim == 2 else image
        if image.shape != self.index.image or image.dtype != np.uint8:
            raise DataError(
                f"sample {number} in {shard.name} is {image.dtype} {image.shape}, not uint8 {self.index.image}"
            )
        return image, label

    def _descriptor(self, shard_number: int) -> int:
        """An open file of the shard. The least recently used one is closed: a process may have 1,024 by default."""
        if shard_number in self._files:
            self._files.move_to_end(shard_number)
        else:
            self._files[shard_number] = os.open(
                self.index.folder / self.index.shards[shard_number].name, os.O_RDONLY
            )
        if len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard_number]

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def open_reader(folder: str, config: DataConfig) -> ShardReader:
    """A reader over `folder`, checked against the recipe's image size and channels."""
    index = read_index(Path(folder))
    height, width, channels = index.image
    if (height, width) != (config.image_size, config.image_size):
        raise DataError(
            f"{folder} holds {height}x{width} images, data.image_size is {config.image_size}; change one"
        )
    if channels != config.channels:
        raise DataError(f"{folder} holds {channels} channels, data.channels is {config.channels}; change one")
    return ShardReader(index, cache=config.cache)


def training_batches(
    reader: ShardReader,
    plan: Plan,
    *,
    steps: range,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """For each optimizer step, this rank's micro-batches."""
    slots = rank_slots(plan.global_batch, rank=rank, world_size=world_size, accumulation=accumulation)
    numbers = (plan.samples(step, part).tolist() for step in steps for part in slots)
    batches = _with_own_words(_loader(reader, numbers, workers=workers))
    slot_tensors = [torch.from_numpy(part) for part in slots]
    for _ in steps:
        step = [next(batches) for _ in slots]
        yield [
            Batch(images, labels, part, torch.ones_like(labels, dtype=torch.bool))
            for (images, labels), part in zip(step, slot_tensors, strict=True)
        ]


def evaluation_batches(reader: ShardReader, *, batch: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Every sample once over all ranks, in order; padding is masked, and all ranks get equally many batches."""
    per_rank = max(1, batch // world_size)
    for start in range(0, len(reader), per_rank * world_size):
        numbers = np.arange(start, start + per_rank * world_size).reshape(world_size, -1)[rank]
        mask = numbers < len(reader)
        images, labels = reader.__getitems__(np.minimum(numbers, len(reader) - 1).tolist())
        yield Batch(images, labels, torch.from_numpy(numbers), torch.from_numpy(mask))


def _loader(reader: ShardReader, numbers: Any, *, workers: int) -> DataLoader[Any]:
    return DataLoader(
        reader,
        batch_sampler=numbers,
        num_workers=0 if reader._memory is not None else workers,
        collate_fn=_as_fetched,
        pin_memory=torch.cuda.is_available(),
    )


def _with_own_words(batches: DataLoader[Any]) -> Iterator[Any]:
    """The same batches. torch wraps what a worker raises in a page of traceback; the last line is the sentence."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None


def _as_fetched(batch: Any) -> Any:
    return batch  # `__getitems__` made tensors of it already
