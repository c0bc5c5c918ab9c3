"""The reader of shards: whole batches of images, read by (shard, offset) and cut to size.

Images are uint8 [B, C, H, W], or of the type that the index states; scaling to [0, 1] happens on the device. Latents are read as their moments (see `forms.py`), and sequences as windows uint8 [B, T, C, H, W]. Each image's bytes are checked against the crc32 of
the index before they are decoded, so that image, class and key belong together whatever happened to the files. A sample that
cannot be used is never skipped silently: in training the next usable one of the index takes its slot, which depends on the
data alone and so is the same on every rank; in evaluation its slot is masked. In both cases the batch reports it.
"""

import math
import os
import zlib
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
from vaescale.config import Window, option_of, size_text
from vaescale.data.augmentation import changed
from vaescale.data.batch import Fault, Fetched, Request
from vaescale.data.code_shards import CodeShards, codes_of_index
from vaescale.data.config import DataConfig, VectorMember
from vaescale.data.forms import CodeMaps, Form, Moments, Pictures, Windows
from vaescale.data.index import CODES, INDEX, LATENTS, SEQUENCES, ShardIndex, parse_index
from vaescale.data.latent_shards import LatentShards, latents_of_index
from vaescale.data.pictures import PictureFault, Resizer
from vaescale.data.sequences import VIDEO, lengths_of, lengths_text
from vaescale.data.shard_files import Located, ShardFiles
from vaescale.data.storage import Folder, Remote, open_store, with_tars
from vaescale.data.vector_members import ShardVectors
from vaescale.data.videos import require_decoder
from vaescale.errors import DataError
from vaescale.system.console import say
from vaescale.system.host import cores

NEXT_SAMPLES, NEXT_SHARDS = 16, 25  # tried in place of an unusable one
SAID_BYTES = 1 << 26  # as many take a second or more to decode


class _Decoded(NamedTuple):
    images: Tensor | list[NDArray[np.uint8]]  # of sequences, all frames of each
    labels: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    faults: dict[int, Fault]


class ShardReader(Dataset[Fetched]):
    """Samples of shards by number, in a form: pictures cut to [C, H, W], moments of latents, codes, or windows of sequences [T, C, H, W]."""

    def __init__(
        self,
        index: ShardIndex,
        store: Folder | Remote,
        form: Form,
        *,
        cache: Literal["memory", "none"] = "none",
        vectors: VectorMember | None = None,
    ) -> None:
        self.index, self.store, self.form, self.vectors = index, store, form, vectors
        self.image_shape = form.image_shape
        self._files = ShardFiles(index, store)
        self._numbering: NDArray[np.int64] | None = None
        self._known_faults: dict[int, Fault] = {}
        self._sound: set[int] = set()  # sequences that were decoded whole
        self.in_memory = cache == "memory"
        self._memory: _Decoded | None = None  # decoded when the first batch is wanted
        if self.in_memory:
            refuse_big_memory(self.memory_bytes)

    def __len__(self) -> int:
        return int(self._files.starts[-1])

    @property
    def window(self) -> Window:
        """The type of the stored images, and the values that are 0 and 1."""
        return self.form.window

    @property
    def sets(self) -> "tuple[ShardReader, ...]":
        """The reader of each set: of one set, this one."""
        return (self,)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the decoded images that are kept in memory, 0 without `cache: memory`."""
        if isinstance(self.form, Windows) and self.in_memory:
            frames = sum(length * number for length, number in lengths_of(self.index).items())
            return frames * math.prod(self.image_shape)
        return len(self) * self.sample_bytes if self.in_memory else 0

    @property
    def has_windows(self) -> bool:
        """Whether a sample is a window of a sequence, at a place that a request gives."""
        return isinstance(self.form, Windows)

    @property
    def sample_bytes(self) -> int:
        """Bytes of the values of one sample."""
        return math.prod(self.form.shape) * self.form.dtype.itemsize

    def __getitem__(self, number: int) -> Fetched:
        return self.__getitems__(Request(np.array([number])))

    def __getitems__(self, request: Request) -> Fetched:
        """Fetch a whole batch, for the DataLoader. Raises DataError when an image and all its substitutes are unusable."""
        fetched = self.fetched(request)
        if request.flips is not None and request.flips.any():
            values = fetched.images.numpy()  # torch does not flip uint16
            values[request.flips] = values[request.flips][..., ::-1]
        if request.changes is not None:
            images = changed(fetched.images, request.changes, zero=self.window.low)
            fetched = fetched._replace(images=images)
        return fetched

    def fetched(self, request: Request) -> Fetched:
        """The samples as they are stored: neither mirrored nor changed."""
        faults: list[Fault] = []
        numbers = request.numbers
        usable = np.ones(len(numbers), dtype=bool)
        if self.in_memory and self._memory is None:
            if self.memory_bytes > SAID_BYTES and comm.rank() == 0:
                size = f"{self.memory_bytes / 2**20:,.0f} MiB"
                say(f"reading the {len(self)} images of {self.index.place} into memory, {size}")
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
            images = self._of_memory(self._memory.images, numbers, request.places)
            labels, keys = self._memory.labels[numbers], self._memory.keys[numbers].tolist()
            if self.vectors is not None:
                taken = self._files.locate(numbers)
        vectors = None if self.vectors is None else self._vectors_of(taken, self.vectors)
        if self._numbering is not None:
            labels = self._numbering[labels]
        names = tuple(key.decode(errors="replace") for key in keys)
        return Fetched(
            images, torch.from_numpy(labels), torch.from_numpy(usable), names, tuple(faults), vectors
        )

    def read_vectors(self, shard_number: int, wanted: VectorMember) -> ShardVectors:
        """The vectors of a shard's samples."""
        return self._files.vectors_of(shard_number, wanted)

    def vectors_at(self, numbers: NDArray[np.int64]) -> Tensor:
        """The vectors of samples, float32 [N, V], NaN without one, of a reader that has `vectors`."""
        assert self.vectors is not None
        return self._vectors_of(self._files.locate(numbers), self.vectors)

    def _vectors_of(self, taken: list[Located], wanted: VectorMember) -> Tensor:
        rows = [self._files.vectors_of(located.shard, wanted).values[located.row] for located in taken]
        return torch.from_numpy(np.array(rows, np.float32).reshape(-1, wanted.size))

    def _of_memory(
        self,
        images: Tensor | list[NDArray[np.uint8]],
        numbers: NDArray[np.int64],
        places: NDArray[np.float64] | None,
    ) -> Tensor:
        if isinstance(images, Tensor):
            return images[torch.from_numpy(numbers)]
        assert isinstance(self.form, Windows)
        windows = torch.zeros((len(numbers), *self.form.shape), dtype=self.form.dtype)
        for slot, number in enumerate(numbers.tolist()):
            if number not in self._known_faults:
                place = 0.0 if places is None else float(places[slot])
                windows.numpy()[slot] = self.form.cut(images[number], place)
        return windows

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that hold the samples."""
        return self._files.shards_of(numbers)

    def keys_of(self, numbers: NDArray[np.int64]) -> list[str]:
        """The names `SHARD:KEY` of samples, as the index has them."""
        return [
            f"{self.index.shards[located.shard].name}:{located.key.decode(errors='replace')}"
            for located in self._files.locate(numbers)
        ]

    def most_class(self) -> int:
        """The greatest class of any image, -1 where none has one. Reads all entries."""
        return int(self.labels().max())

    def labels(self) -> NDArray[np.int64]:
        """The class of each image, -1: none. Reads all entries."""
        return np.concatenate([self.labels_of(shard) for shard in range(len(self.index.shards))])

    def labels_of(self, shard_number: int) -> NDArray[np.int64]:
        """The class of each image of a shard, -1: none."""
        labels = self._files.entries_of(shard_number)["label"].astype(np.int64)
        return labels if self._numbering is None else self._numbering[labels]

    def number_classes(self, names: tuple[str, ...]) -> None:
        """Number classes by their place in `names`, which has all of the index's."""
        numbers = [names.index(name) for name in self.index.class_names]
        self._numbering = np.array([*numbers, -1], dtype=np.int64)  # the last one is that of -1
        self.index = self.index._replace(class_names=names)

    @property
    def remote_stores(self) -> list[Remote]:
        """The stores that are not on this node."""
        return [self.store] if isinstance(self.store, Remote) else []

    def fetch_shard(self, shard_number: int) -> None:
        """Bring a remote shard and its entries to this node."""
        shard = self.index.shards[shard_number]
        self.store.local(shard.entries_name, shard.entries_bytes, shard.entries_sha256)
        self.store.local(shard.name, shard.bytes, shard.sha256)

    def _read(
        self, request: Request, usable: NDArray[np.bool_], faults: list[Fault]
    ) -> tuple[Tensor, list[Located]]:
        """The images of a request, and the samples that were taken."""
        images = torch.zeros((len(request.numbers), *self.form.shape), dtype=self.form.dtype)
        values = images.numpy()
        taken = self._files.locate(request.numbers)
        resizer = self._resizer(values)
        for slot, number in enumerate(request.numbers.tolist()):
            place = 0.0 if request.places is None else float(request.places[slot])
            try:
                self._put(slot, self._decode(number, taken[slot], place), values, resizer)
            except PictureFault as error:
                self._remember(number, error)
                other = self._refilled(number, request.refill, faults)
                usable[slot] = other >= 0
                if usable[slot]:
                    (taken[slot],) = self._files.locate(np.array([other]))
                    self._put(slot, self._decode(other, taken[slot], place), values, resizer)
        if resizer is not None:
            resizer.flush()
        return images, taken

    def _resizer(self, values: Any) -> Resizer | None:
        """What resizes pictures into `values`; None for other samples."""
        return Resizer(values, self.form.resample) if isinstance(self.form, Pictures) else None

    def _put(self, slot: int, part: NDArray[Any], values: Any, resizer: Resizer | None) -> None:
        """Store what `_decode` returns, a picture at the latest when the resizer is flushed."""
        if resizer is None:
            values[slot] = part
        else:
            resizer.add(slot, part)

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
            start, stop = self._files.starts[shard : shard + 2].tolist()
            yield from range(start, min(stop, start + 4))

    def _is_usable(self, number: int) -> bool:
        if self._memory is None and number not in self._known_faults:
            (located,) = self._files.locate(np.array([number]))
            try:
                self._decode(number, located)
            except PictureFault as error:
                self._remember(number, error)
        return number not in self._known_faults

    def _remember(self, number: int, error: PictureFault) -> None:
        if number not in self._known_faults:
            (located,) = self._files.locate(np.array([number]))
            name = self.index.shards[located.shard].name
            member = f"member {located.key.decode(errors='replace')!r} at byte {located.offset}"
            message = f"{self.index.place}/{name} {member}: {error}"
            self._known_faults[number] = Fault(number, error.reason, message)

    def _decode_all(self) -> _Decoded:
        """Decode all images, in a thread per core: the decoders release the interpreter's lock."""
        if isinstance(self.form, Windows):
            whole: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(self)
            images: Tensor | list[NDArray[np.uint8]] = whole
            values: Any = whole
        else:
            images = torch.empty((len(self), *self.form.shape), dtype=self.form.dtype)
            values = images.numpy()

        def work(
            shard_number: int,
        ) -> tuple[NDArray[np.int64], NDArray[np.bytes_], list[tuple[int, PictureFault]]]:
            entries, faults = self._files.load_entries(shard_number), []
            start = int(self._files.starts[shard_number])
            resizer = self._resizer(values)
            with self._files.open_shard(shard_number) as file:
                for number, entry in enumerate(entries, start=start):
                    try:
                        content = os.pread(file.fileno(), int(entry["bytes"]), int(entry["offset"]))
                        self._put(number, self._part(content, int(entry["crc32"])), values, resizer)
                    except PictureFault as error:
                        if not self.has_windows:
                            values[number] = 0
                        faults.append((number, error))
            if resizer is not None:
                resizer.flush()
            if any(error.reason == "changed" for _, error in faults) and self._files.drop_cached(
                shard_number
            ):
                return work(shard_number)
            return entries["label"].astype(np.int64), entries["key"], faults

        with ThreadPoolExecutor(cores()) as pool:
            results = list(pool.map(work, range(len(self.index.shards))))
        for number, error in (fault for result in results for fault in result[2]):
            self._remember(number, error)
        labels, keys = (np.concatenate([result[column] for result in results]) for column in (0, 1))
        return _Decoded(images, labels, keys, self._known_faults)

    def _decode(self, number: int, located: Located, place: float = 0.0) -> NDArray[Any]:
        """Decode a sample to its values, a picture to the part that is resized, of a sequence the window at `place`. Raises PictureFault."""
        if number in self._known_faults:
            fault = self._known_faults[number]
            raise PictureFault(fault.reason, fault.words)
        try:
            return self._window(number, located, place)
        except PictureFault as error:
            if error.reason != "changed" or not self._files.drop_cached(located.shard):
                raise
        return self._window(number, located, place)

    def _window(self, number: int, located: Located, place: float) -> NDArray[Any]:
        """The values of a sample, or the part of a picture; of a sequence the window at `place`.

        Whether a sequence can be used is a fact about all of its frames, whatever the window: its first reading decodes them all.
        """
        content = self._files.content(located)
        if not isinstance(self.form, Windows):
            return self._part(content, located.crc32)
        if number in self._sound:
            _check(content, located.crc32)
            return self.form.values(content, place)
        frames = self._part(content, located.crc32)
        self._sound.add(number)
        return self.form.cut(frames, place)

    def _part(self, content: bytes, crc32: int) -> NDArray[Any]:
        """The values of a sample's bytes, the part of a picture, of a sequence all frames."""
        _check(content, crc32)
        if isinstance(self.form, Windows):
            return self.form.whole(content)
        return self.form.part(content) if isinstance(self.form, Pictures) else self.form.values(content)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs of a reader: nothing that it can decode again."""
        return {**self.__dict__, "_memory": None}


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
    form = _form(index, config)
    for shard in index.shards[comm.rank() :: comm.world_size()]:
        store.check(shard.name, shard.bytes)
        store.check(shard.entries_name, shard.entries_bytes)
    return ShardReader(index, store, form, cache=config.cache, vectors=config.vectors)


def refuse_big_memory(needed: int) -> None:
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


def _check(content: bytes, crc32: int) -> None:
    if zlib.crc32(content) != crc32:
        raise PictureFault("changed", "its bytes are not those that were indexed")


def _form(index: ShardIndex, config: DataConfig) -> Form:
    """The form in which a recipe reads a set. Raises DataError when the stored samples cannot be read so."""
    shape = config.image_shape
    if config.holds == "latents":
        latents = latents_of_index(index, Path(index.place))
        _refuse_other_latents(latents, shape)
        return Moments(shape, latents.dtype, latents.header, latents.member_bytes)
    if config.holds == "codes":
        codes = codes_of_index(index, Path(index.place))
        _refuse_other_codes(codes, shape)
        return CodeMaps(shape, codes.header)
    if config.holds == "sequences":
        assert config.frames is not None
        _refuse_other_sequences(index, shape, config.frames, config.max_skipped)
        if index.made.get("image_member") == VIDEO:
            require_decoder()
        return Windows(shape, config.frames)
    _refuse_misfit(index, config)
    return Pictures(shape, config.crop, config.resample, config.window)


def _refuse_other_latents(latents: LatentShards, shape: tuple[int, int, int]) -> None:
    """Raise DataError when latents are no moments, or of another shape than the recipe's."""
    if latents.draws:
        raise DataError(
            f"{latents.folder} holds draws, and data.holds=latents reads the means and variances of q(z|x); give a folder that "
            "`vaescale encode RUN` writes without --draws"
        )
    channels, *size = latents.shape
    height, width = size or (1, 1)
    if shape != (channels, height, width):
        raise DataError(
            f"{latents.folder} holds latents of shape {list(latents.shape)}; set data.channels={channels} and "
            f"data.image_size={size_text((height, width))}"
        )


def _refuse_other_codes(codes: CodeShards, shape: tuple[int, int, int]) -> None:
    """Raise DataError when codes are others, or of another shape, than the recipe's."""
    if shape != (codes.codes, *codes.shape):
        raise DataError(
            f"{codes.folder} holds maps {list(codes.shape)} of {codes.codes} codes; set data.channels={codes.codes} and "
            f"data.image_size={size_text(codes.shape)}"
        )


def _refuse_other_sequences(
    index: ShardIndex, shape: tuple[int, int, int], frames: int, max_skipped: float
) -> None:
    """Raise DataError when sequences are of other frames than the recipe's, or when too many are shorter; say how many are."""
    lengths = lengths_of(index)
    assert index.image is not None
    height, width, channels = index.image
    if shape != (channels, height, width):
        raise DataError(
            f"{index.place} holds sequences of {height}x{width} frames with {channels} channels; set data.channels={channels} and "
            f"data.image_size={size_text((height, width))}"
        )
    short = sum(number for length, number in lengths.items() if length < frames)
    if not short:
        return
    message = (
        f"{short} of {index.num_samples} sequences of {index.place}, which have {lengths_text(lengths)}, are shorter than data.frames "
        f"(={frames})"
    )
    if short > max_skipped * index.num_samples:
        raise DataError(
            f"{message}; set data.frames={min(lengths)} or less, or write the shards again with longer ones"
        )
    if comm.rank() == 0:
        say(f"{message}, and are left out")


def _refuse_misfit(index: ShardIndex, config: DataConfig) -> None:
    """Raise DataError when the stored images cannot be read as the recipe says."""
    if index.made.get("kind") == CODES:
        raise DataError(f"{index.place} holds codes, not images; give data.train and data.val sets of images")
    if index.made.get("kind") == SEQUENCES:
        lengths = lengths_of(index)
        raise DataError(
            f"{index.place} holds sequences of {lengths_text(lengths)}, not images; give a set of images, or train a model of sequences "
            f"on it: data.holds=sequences and data.frames={min(lengths)}"
        )
    if index.made.get("kind") == LATENTS:
        raise DataError(
            f"{index.place} holds latents, not images; give data.train and data.val sets of images, or set data.holds=latents to "
            "train a model of the latents"
        )
    if index.values.dtype != config.dtype:
        low, high = index.values.low, index.values.high
        window = (
            "" if index.values.dtype == "uint8" else f" and data.range=[{low:g}, {high:g}], or a window in it"
        )
        raise DataError(
            f"{index.place} holds {index.values.text()}, data.dtype is {config.dtype}; set data.dtype={index.values.dtype}{window}, or give "
            f"shards of {config.dtype}"
        )
    if index.image is None:
        if config.crop is None:
            raise DataError(
                f"{index.place} holds images of several sizes or channels; set data.crop={config.largest_crop}, or write them to "
                f"another folder with `vaescale make-shards ... --size {option_of(config.image_size)} --channels {config.channels}`"
            )
        return
    height, width, channels = index.image
    if (height, width) != config.sides and config.crop is None:
        raise DataError(
            f"{index.place} holds {height}x{width} images, data.image_size is {size_text(config.image_size)}; change one, or set "
            f"data.crop={config.largest_crop} to resize"
        )
    if isinstance(config.crop, int) and config.crop > min(height, width):
        raise DataError(f"data.crop (={config.crop}) exceeds the {height}x{width} images of {index.place}")
    may_repeat = (channels, config.channels) == (1, 3) and config.dtype == "uint8"
    if channels < config.channels and not may_repeat:
        remedy = (
            "write the shards again with --channels 4 to keep alpha channels, or " if channels == 3 else ""
        )
        raise DataError(
            f"{index.place} holds {channels} channels, data.channels is {config.channels}; {remedy}set data.channels={channels}"
        )
    if channels > config.channels:
        raise DataError(
            f"{index.place} holds {channels} channels, data.channels is {config.channels}; set data.channels={channels}, or "
            f"write the shards again to another folder with --channels {config.channels}"
        )
