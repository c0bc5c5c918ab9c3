"""Readers of several sets: of all their samples, numbered through, and of the training mixture as the weights have it."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale.data.batch import Fault, Fetched, Request
from vaescale.data.index import ShardIndex, ShardTable
from vaescale.data.mixed_plan import MixedPlan
from vaescale.data.reader import ShardReader, refuse_big_memory
from vaescale.data.storage import Remote
from vaescale.system.secrets import redact


class MixedReader(ShardReader):
    """The samples of several sets: those of the first one, then those of the next.

    readers: of the sets, in one form and with one numbering of the classes. A sample that cannot be used is replaced by one of its set.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = tuple(readers)
        first = readers[0]
        self.form, self.image_shape, self.in_memory = first.form, first.image_shape, first.in_memory
        self.index, self.vectors = _joined([reader.index for reader in readers]), first.vectors
        self.firsts = np.cumsum([0, *(len(reader) for reader in readers)])
        self._first_shards = np.cumsum([0, *(len(reader.index.shards) for reader in readers)])
        if self.in_memory:
            refuse_big_memory(self.memory_bytes)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def sets(self) -> tuple[ShardReader, ...]:
        """The reader of each set."""
        return self.readers

    def fetched(self, request: Request) -> Fetched:
        """The samples of a request, each read by the reader of its set."""
        size = len(request.numbers)
        images = torch.empty((size, *self.form.shape), dtype=self.form.dtype)
        labels, usable = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.bool)
        keys, faults, values = [""] * size, list[Fault](), images.numpy()
        wanted = self.readers[0].vectors
        vectors = None if wanted is None else torch.empty(size, wanted.size)
        for which, slots, numbers in self._by_set(request.numbers):
            part = self.readers[which].fetched(Request(numbers, refill=request.refill))
            places = torch.from_numpy(slots)
            values[slots] = part.images.numpy()  # torch does not assign uint16 by index
            labels[places], usable[places] = part.labels, part.usable
            if vectors is not None and part.vectors is not None:
                vectors[places] = part.vectors
            for slot, key in zip(slots.tolist(), part.keys, strict=True):
                keys[slot] = key
            first = int(self.firsts[which])
            faults += [fault._replace(number=fault.number + first) for fault in part.faults]
        return Fetched(images, labels, usable, tuple(keys), tuple(faults), vectors)

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that hold the samples, counted through all sets."""
        shards = np.empty(len(numbers), dtype=np.int64)
        for which, slots, inside in self._by_set(numbers):
            shards[slots] = self._first_shards[which] + self.readers[which].shards_of(inside)
        return shards

    def keys_of(self, numbers: NDArray[np.int64]) -> list[str]:
        """The names `PLACE/SHARD:KEY` of samples."""
        names = [""] * len(numbers)
        for which, slots, inside in self._by_set(numbers):
            reader = self.readers[which]
            for slot, key in zip(slots.tolist(), reader.keys_of(inside), strict=True):
                names[slot] = f"{redact(reader.index.place)}/{key}"
        return names

    def labels_of(self, shard_number: int) -> NDArray[np.int64]:
        """The class of each image of a shard, -1: none."""
        which, inside = self._shard(shard_number)
        return self.readers[which].labels_of(inside)

    def fetch_shard(self, shard_number: int) -> None:
        """Bring a shard and its entries to this node."""
        which, inside = self._shard(shard_number)
        self.readers[which].fetch_shard(inside)

    @property
    def remote_stores(self) -> list[Remote]:
        """The stores that are not on this node."""
        return [store for reader in self.readers for store in reader.remote_stores]

    def _shard(self, shard_number: int) -> tuple[int, int]:
        """The set that has a shard, and the shard's number in it."""
        which = int(np.searchsorted(self._first_shards, shard_number, side="right")) - 1
        return which, shard_number - int(self._first_shards[which])

    def _by_set(
        self, numbers: NDArray[np.int64]
    ) -> Iterable[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Each set that has some of the samples, which of them these are, and their numbers in the set."""
        sets = np.searchsorted(self.firsts, numbers, side="right") - 1
        for which in np.unique(sets).tolist():
            slots = np.flatnonzero(sets == which)
            yield which, slots, numbers[slots] - self.firsts[which]


class MixtureReader(ShardReader):
    """An epoch of a mixture, for what measures the training images: each set, and class, as often as training draws it.

    reader: of the sets. The samples of a set are spread evenly over it, and some come more than once where training repeats them.
    """

    def __init__(self, reader: ShardReader, plan: MixedPlan) -> None:
        self.reader, self.plan = reader, plan
        self.form, self.image_shape, self.in_memory = reader.form, reader.image_shape, reader.in_memory
        self.index, self.vectors = _epoch_of(reader.index, plan), reader.vectors
        self._starts = np.concatenate([[0], np.cumsum(self.index.shards.samples)])

    def __len__(self) -> int:
        return self.plan.num_samples

    @property
    def sets(self) -> tuple[ShardReader, ...]:
        """The reader of each set."""
        return self.reader.sets

    def fetched(self, request: Request) -> Fetched:
        """The samples at places of the epoch, which faults are numbered by too. A key names its place, as samples repeat."""
        numbers = self.plan.in_an_epoch(request.numbers)
        fetched = self.reader.fetched(request._replace(numbers=numbers))
        by_number = {fault.number: fault for fault in fetched.faults}
        places = list(zip(request.numbers.tolist(), numbers.tolist(), strict=True))
        faults = [by_number[n]._replace(number=place) for place, n in places if n in by_number]
        keys = [f"{place:09d}-{key}" for (place, _), key in zip(places, fetched.keys, strict=True)]
        return fetched._replace(keys=tuple(keys), faults=tuple(faults))

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the epoch's parts, in which it is encoded."""
        return np.searchsorted(self._starts, numbers, side="right") - 1

    def keys_of(self, numbers: NDArray[np.int64]) -> list[str]:
        """The names of samples at places of the epoch."""
        return self.reader.keys_of(self.plan.in_an_epoch(numbers))

    def labels_of(self, shard_number: int) -> NDArray[np.int64]:
        """The class of each image of a part of the epoch, -1: none. Reads all entries at the first call."""
        places = np.arange(self._starts[shard_number], self._starts[shard_number + 1])
        return self._all_labels[self.plan.in_an_epoch(places)]

    @cached_property
    def _all_labels(self) -> NDArray[np.int64]:
        return self.reader.labels()

    @property
    def remote_stores(self) -> list[Remote]:
        """The stores that are not on this node."""
        return self.reader.remote_stores


def _joined(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """The index of several sets together. Shards of different sets may have the same name."""
    shapes = {index.image for index in indexes}
    shards = ShardTable(row for index in indexes for row in index.shards.rows)
    place = " + ".join(index.place for index in indexes)
    made = {"sets": [index.made for index in indexes]}
    values = [index.values for index in indexes]  # of one type, which the recipe names
    bounds = values[0]._replace(low=min(one.low for one in values), high=max(one.high for one in values))
    image = shapes.pop() if len(shapes) == 1 else None
    return ShardIndex(place, shards, image, indexes[0].class_names, made, values=bounds)


def _epoch_of(index: ShardIndex, plan: MixedPlan) -> ShardIndex:
    """The index of an epoch of a mixture: as many parts as the sets have shards, identified by these and by the plan."""
    origin = f"{index.data_hash} {plan.shares_hash} ".encode()
    parts, rows = len(index.shards), list[str]()
    for number, samples in enumerate(np.diff(np.arange(parts + 1) * plan.num_samples // parts).tolist()):
        sha256 = hashlib.sha256(origin + str(number).encode()).hexdigest()
        rows.append(f"1 {sha256} {samples} 1 {sha256} mixture-{number:06d}.tar")
    made = {**index.made, "mixture": [part.weight for part in plan.parts]}
    return index._replace(shards=ShardTable(rows), made=made)
