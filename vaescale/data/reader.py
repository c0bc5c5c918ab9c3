"""The reader of shards: whole batches of images, read by (shard, offset) and cut to size.

Images are uint8 [B, C, H, W]; scaling to [0, 1] happens on the device. Each image's bytes are checked against the crc32 of
the index before they are decoded, so that image, class and key belong together whatever happened to the files. A sample that
cannot be used is never skipped silently: in training the next usable one of the index takes its slot, which depends on the
data alone and so is the same on every rank; in evaluation its slot is masked. In both cases the batch reports it.
"""

import io
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vaescale import comm
from vaescale.data.batch import Fault, Fetched, Request
from vaescale.data.config import Crop, DataConfig, Filter
from vaescale.data.index import INDEX, LATENTS, Entries, ShardIndex, parse_entries, parse_index
from vaescale.data.pictures import Picture, PictureFault, decode, fit, to_channels
from vaescale.data.storage import Folder, Remote, open_store, with_tars
from vaescale.errors import DataError
from vaescale.system.console import say
from vaescale.system.host import cores

OPEN_SHARDS = 128
NEXT_SAMPLES, NEXT_SHARDS = 16, 25  # tried in place of an unusable one


class _Located(NamedTuple):
    """A shard's number, and the fields of an entry."""

    shard: int
    offset: int
    size: int
    crc32: int
    label: int
    key: bytes


class _Decoded(NamedTuple):
    images: Tensor
    labels: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    faults: dict[int, Fault]


class ShardReader(Dataset[Fetched]):
    """Samples of shards by number, cut to [C, size, size]."""

    def __init__(
        self,
        index: ShardIndex,
        store: Folder | Remote,
        *,
        size: int,
        channels: int,
        crop: Crop | None = None,
        resample: Filter = "bicubic",
        cache: Literal["memory", "none"] = "none",
    ) -> None:
        self.index, self.store = index, store
        self._shape = (size, size, channels)
        self.image_shape = (channels, size, size)
        self._crop, self._resample = crop, resample
        self._starts = np.concatenate([[0], np.cumsum(index.shards.samples)])
        self._entries: OrderedDict[int, Entries] = OrderedDict()
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._known_faults: dict[int, Fault] = {}
        self._dropped: set[int] = set()
        self.in_memory = cache == "memory"
        self._memory: _Decoded | None = None  # decoded when the first batch is wanted
        if self.in_memory:
            _refuse_big_memory(self.memory_bytes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the decoded images that are kept in memory, 0 without `cache: memory`."""
        return len(self) * math.prod(self._shape) if self.in_memory else 0

    def __getitem__(self, number: int) -> Fetched:
        return self.__getitems__(Request(np.array([number])))

    def __getitems__(self, request: Request) -> Fetched:
        """Fetch a whole batch, for the DataLoader. Raises DataError when an image and all its substitutes are unusable."""
        faults: list[Fault] = []
        numbers = request.numbers
        usable = np.ones(len(numbers), dtype=bool)
        if self.in_memory and self._memory is None:
            self._memory = self._decode_all()
        if self._memory is None:
            images, taken = self._read(request, usable, faults)
            labels = np.array([located.label for located in taken], dtype=np.int64)
            keys = [located.key for located in taken]
        else:
            if self._memory.faults:
                replacements = np.array([self._refilled(int(n), request.refill, faults) for n in numbers])
                usable = replacements >= 0
                numbers = np.where(usable, replacements, numbers)  # a masked slot keeps its own key and class
            images = self._memory.images[torch.from_numpy(numbers)]
            labels, keys = self._memory.labels[numbers], self._memory.keys[numbers].tolist()
        if request.flips is not None and request.flips.any():
            mirrored = torch.from_numpy(request.flips)
            images[mirrored] = images[mirrored].flip(-1)
        names = tuple(key.decode(errors="replace") for key in keys)
        return Fetched(images, torch.from_numpy(labels), torch.from_numpy(usable), names, tuple(faults))

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that hold the samples."""
        return np.searchsorted(self._starts, numbers, side="right") - 1

    def keys_of(self, numbers: NDArray[np.int64]) -> list[str]:
        """The names `SHARD:KEY` of samples, as the index has them."""
        return [
            f"{self.index.shards[located.shard].name}:{located.key.decode(errors='replace')}"
            for located in self._locate(numbers)
        ]

    def most_class(self) -> int:
        """The greatest class of any image, -1 where none has one. Reads all entries."""
        return max(int(self._entries_of(shard)["label"].max()) for shard in range(len(self.index.shards)))

    def fetch_shard(self, shard_number: int) -> None:
        """Bring a remote shard and its entries to this node."""
        shard = self.index.shards[shard_number]
        self.store.local(shard.entries_name, shard.entries_bytes, shard.entries_sha256)
        self.store.local(shard.name, shard.bytes, shard.sha256)

    def _read(
        self, request: Request, usable: NDArray[np.bool_], faults: list[Fault]
    ) -> tuple[Tensor, list[_Located]]:
        """The images of a request, and the samples that were taken."""
        height, width, channels = self._shape
        images = np.zeros((len(request.numbers), channels, height, width), np.uint8)
        taken = self._locate(request.numbers)
        for slot, number in enumerate(request.numbers.tolist()):
            try:
                images[slot] = self._decode(number, taken[slot]).transpose(2, 0, 1)
            except PictureFault as error:
                self._remember(number, error)
                other = self._refilled(number, request.refill, faults)
                usable[slot] = other >= 0
                if usable[slot]:
                    (taken[slot],) = self._locate(np.array([other]))
                    images[slot] = self._decode(other, taken[slot]).transpose(2, 0, 1)
        return torch.from_numpy(images), taken

    def _refilled(self, number: int, refill: bool, faults: list[Fault]) -> int:
        """The sample for a slot: `number`, the next usable one of the index, or -1 where no other one may take it."""
        if number not in self._known_faults:
            return number
        first = self._known_faults[number]
        faults.append(first)
        if not refill:
            return -1
        candidates = list(self._candidates(number))
        for candidate in candidates:
            if self._is_usable(candidate):
                return candidate
        remedy = "upload the shards again"
        if isinstance(self.store, Folder):
            remedy = f"`vaescale verify-shards {self.index.place} --deep` names them all"
        raise DataError(f"{first.words}, and none of {len(candidates)} others can be used; {remedy}")

    def _candidates(self, number: int) -> Iterator[int]:
        """The samples that may take a slot: the next ones, then the first ones of the shards that follow."""
        yield from ((number + i) % len(self) for i in range(1, min(NEXT_SAMPLES + 1, len(self))))
        first, shards = int(self.shards_of(np.array([number]))[0]), len(self.index.shards)
        for shard in ((first + i) % shards for i in range(1, min(NEXT_SHARDS, shards))):
            start, stop = self._starts[shard : shard + 2].tolist()
            yield from range(start, min(stop, start + 4))

    def _is_usable(self, number: int) -> bool:
        if self._memory is None and number not in self._known_faults:
            try:
                self._decode(number, *self._locate(np.array([number])))
            except PictureFault as error:
                self._remember(number, error)
        return number not in self._known_faults

    def _remember(self, number: int, error: PictureFault) -> None:
        if number not in self._known_faults:
            (located,) = self._locate(np.array([number]))
            name = self.index.shards[located.shard].name
            member = f"member {located.key.decode(errors='replace')!r} at byte {located.offset}"
            message = f"{self.index.place}/{name} {member}: {error}"
            self._known_faults[number] = Fault(number, error.reason, message)

    def _decode_all(self) -> _Decoded:
        """Decode all images, in a thread per core: the decoders release the interpreter's lock."""
        size = self._shape
        images = torch.empty((len(self), size[2], *size[:2]), dtype=torch.uint8)
        values = images.numpy()

        def work(
            shard_number: int,
        ) -> tuple[NDArray[np.int64], NDArray[np.bytes_], list[tuple[int, PictureFault]]]:
            entries, faults = self._load_entries(shard_number), []
            start = int(self._starts[shard_number])
            with self._open_shard(shard_number) as file:
                for number, entry in enumerate(entries, start=start):
                    try:
                        content = os.pread(file.fileno(), int(entry["bytes"]), int(entry["offset"]))
                        image = self._picture(content, int(entry["crc32"]))
                        values[number] = image.transpose(2, 0, 1)
                    except PictureFault as error:
                        values[number] = 0
                        faults.append((number, error))
            if any(error.reason == "changed" for _, error in faults) and self._drop_cached(shard_number):
                return work(shard_number)
            return entries["label"].astype(np.int64), entries["key"], faults

        with ThreadPoolExecutor(cores()) as pool:
            results = list(pool.map(work, range(len(self.index.shards))))
        for number, error in (fault for result in results for fault in result[2]):
            self._remember(number, error)
        labels, keys = (np.concatenate([result[column] for result in results]) for column in (0, 1))
        return _Decoded(images, labels, keys, self._known_faults)

    def _decode(self, number: int, located: _Located) -> Picture:
        """Decode a sample to uint8 [H, W, C]. Raises PictureFault."""
        if number in self._known_faults:
            fault = self._known_faults[number]
            raise PictureFault(fault.reason, fault.words)
        try:
            return self._picture(self._content(located), located.crc32)
        except PictureFault as error:
            if error.reason != "changed" or not self._drop_cached(located.shard):
                raise
        return self._picture(self._content(located), located.crc32)

    def _picture(self, content: bytes, crc32: int) -> Picture:
        if zlib.crc32(content) != crc32:
            raise PictureFault("changed", "its bytes are not those that were indexed")
        image = to_channels(decode(content), self._shape[2])
        return fit(image, size=self._shape[0], crop=self._crop, resample=self._resample)

    def _locate(self, numbers: NDArray[np.int64]) -> list[_Located]:
        """The shard and the entry of each sample."""
        shards = self.shards_of(numbers)
        rows = (numbers - self._starts[shards]).tolist()
        return [
            _Located(shard, *self._entries_of(shard)[row].item())
            for shard, row in zip(shards.tolist(), rows, strict=True)
        ]

    def _entries_of(self, shard_number: int) -> Entries:
        if shard_number in self._entries:
            self._entries.move_to_end(shard_number)
        else:
            self._entries[shard_number] = self._load_entries(shard_number)
            if len(self._entries) > 8 * OPEN_SHARDS:
                self._entries.popitem(last=False)
        return self._entries[shard_number]

    def _drop_cached(self, shard_number: int) -> bool:
        """Drop a remote shard from the cache, once per process: a disk may have changed it. Returns whether it did."""
        if not isinstance(self.store, Remote) or shard_number in self._dropped:
            return False
        self._dropped.add(shard_number)
        shard = self.index.shards[shard_number]
        self.store.forget(shard.name, shard.sha256)
        self.store.forget(shard.entries_name, shard.entries_sha256)
        return True

    def _load_entries(self, shard_number: int) -> Entries:
        shard = self.index.shards[shard_number]
        try:
            with self._open_file(shard.entries_name, shard.entries_bytes, shard.entries_sha256) as file:
                return parse_entries(file.read(), shard, self.index.place)
        except DataError:
            if not self._drop_cached(shard_number):
                raise
            return self._load_entries(shard_number)

    def _open_shard(self, shard_number: int) -> io.FileIO:
        shard = self.index.shards[shard_number]
        return self._open_file(shard.name, shard.bytes, shard.sha256)

    def _open_file(self, name: str, size: int, sha256: str) -> io.FileIO:
        for _ in range(10):  # the cache may evict the file before it is opened
            path = self.store.local(name, size, sha256)
            try:
                return io.FileIO(path)
            except FileNotFoundError:
                if isinstance(self.store, Folder):
                    raise DataError(f"{path} is missing; copy it back, or write the shards again") from None
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
        raise DataError(f"{name} is evicted as fast as it is fetched; raise data.cache_bytes")

    def _content(self, located: _Located) -> bytes:
        try:
            if isinstance(self.store, Remote):
                with self._open_shard(located.shard) as file:
                    return os.pread(file.fileno(), located.size, located.offset)
            return os.pread(self._kept_open(located.shard).fileno(), located.size, located.offset)
        except OSError as error:
            name = self.index.shards[located.shard].name
            raise DataError(f"{self.index.place}/{name} cannot be read: {error.strerror}") from error

    def _kept_open(self, shard_number: int) -> io.FileIO:
        """An open file of the shard. The least recently used one is closed: a process may have 1,024 by default."""
        if shard_number in self._files:
            self._files.move_to_end(shard_number)
        else:
            self._files[shard_number] = self._open_shard(shard_number)
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        return self._files[shard_number]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs of a reader: no open files, and nothing that it can read again."""
        emptied: dict[str, Any] = {"_entries": OrderedDict(), "_files": OrderedDict(), "_memory": None}
        return {**self.__dict__, **emptied}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            file.close()


def open_index(place: str) -> ShardIndex:
    """Read the index of the folder or URL `place`. Raises DataError."""
    defaults = DataConfig.model_fields
    store = open_store(
        place,
        cache=None,
        cache_bytes=defaults["cache_bytes"].default,
        retry_seconds=defaults["retry_seconds"].default,
    )
    return parse_index(store.read_index(INDEX), place)


def open_reader(place: str, config: DataConfig) -> ShardReader:
    """Open a reader of the folder or URL `place`, checked against the recipe.

    Each rank checks its share of the files. Raises DataError.
    """
    store = open_store(
        place,
        cache=config.cache_dir,
        cache_bytes=config.cache_bytes,
        retry_seconds=config.retry_seconds,
    )
    index = parse_index(store.read_index(INDEX), place)
    store = with_tars(store, index.tars)
    _refuse_misfit(index, config)
    for shard in index.shards[comm.rank() :: comm.world_size()]:
        store.check(shard.name, shard.bytes)
        store.check(shard.entries_name, shard.entries_bytes)
    return ShardReader(
        index,
        store,
        size=config.image_size,
        channels=config.channels,
        crop=config.crop,
        resample=config.resample,
        cache=config.cache,
    )


def _refuse_big_memory(needed: int) -> None:
    """Raise DataError when `cache: memory` cannot hold the images. Unknown free memory counts as enough."""
    ranks = comm.ranks_on_this_node()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        if needed * ranks > free:
            raise DataError(
                f"data.cache=memory needs {needed} bytes in each of {ranks} processes, {free} are free; use "
                f"data.cache=none"
            )


def _refuse_misfit(index: ShardIndex, config: DataConfig) -> None:
    """Raise DataError when the stored images cannot be read as the recipe says."""
    if index.made.get("kind") == LATENTS:
        raise DataError(
            f"{index.place} holds latents, not images; give data.train and data.val sets of images"
        )
    if index.image is None:
        if config.crop is None:
            raise DataError(
                f"{index.place} holds images of several sizes or channels; set data.crop=square, or write them again "
                f"with `vaescale make-shards ... --size {config.image_size} --channels {config.channels}`"
            )
        return
    height, width, channels = index.image
    if (height, width) != (config.image_size, config.image_size) and config.crop is None:
        raise DataError(
            f"{index.place} holds {height}x{width} images, data.image_size is {config.image_size}; change one, or set "
            f"data.crop=square to resize"
        )
    if isinstance(config.crop, int) and config.crop > min(height, width):
        raise DataError(f"data.crop (={config.crop}) exceeds the {height}x{width} images of {index.place}")
    if channels > config.channels:
        raise DataError(
            f"{index.place} holds {channels} channels, data.channels is {config.channels}; set data.channels={channels}, or "
            f"write the shards again to another folder with --channels {config.channels}"
        )
    if channels < config.channels and comm.rank() == 0:
        say(f"{index.place} holds grey images; data.channels={config.channels} repeats their one channel")
