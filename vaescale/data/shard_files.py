"""The files of a set of shards: where a sample is, and its bytes.

Few files are open at once. A remote shard is fetched to this node first, and fetched again where the node's disk changed it.
"""

import io
import os
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import VectorMember
from vaescale.data.index import Entries, ShardIndex, parse_entries
from vaescale.data.storage import Folder, Remote
from vaescale.data.tars import TarFault
from vaescale.data.vector_members import ShardVectors, vectors_of
from vaescale.errors import DataError

OPEN_SHARDS = 128
ENTRY_FIELDS = 5  # of an entry; one of a sequence also has the number of its frames


class Located(NamedTuple):
    """The place of a sample: its shard's number, the fields of an entry, and the entry's number in the shard."""

    shard: int
    offset: int
    size: int
    crc32: int
    label: int
    key: bytes
    row: int


class ShardFiles:
    """The entries and the bytes of samples by number. It can be sent to another process, which opens the files anew."""

    def __init__(self, index: ShardIndex, store: Folder | Remote) -> None:
        self.index, self.store = index, store
        self.starts = np.concatenate([[0], np.cumsum(index.shards.samples)])  # the first sample of each shard
        self._entries: OrderedDict[int, Entries] = OrderedDict()
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._vectors: OrderedDict[int, ShardVectors] = OrderedDict()
        self._dropped: set[int] = set()

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that hold the samples."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def locate(self, numbers: NDArray[np.int64]) -> list[Located]:
        """The shard and the entry of each sample."""
        shards = self.shards_of(numbers)
        rows = (numbers - self.starts[shards]).tolist()
        return [
            Located._make((shard, *self.entries_of(shard)[row].item()[:ENTRY_FIELDS], row))
            for shard, row in zip(shards.tolist(), rows, strict=True)
        ]

    def entries_of(self, shard_number: int) -> Entries:
        """The entries of a shard; those of recently used shards are kept."""
        if shard_number in self._entries:
            self._entries.move_to_end(shard_number)
        else:
            self._entries[shard_number] = self.load_entries(shard_number)
            if len(self._entries) > 8 * OPEN_SHARDS:
                self._entries.popitem(last=False)
        return self._entries[shard_number]

    def vectors_of(self, shard_number: int, wanted: VectorMember) -> ShardVectors:
        """The vectors of a shard's samples; those of recently used shards are kept. Raises DataError for a tar that is not sound."""
        if shard_number in self._vectors:
            self._vectors.move_to_end(shard_number)
            return self._vectors[shard_number]
        try:
            with self.open_shard(shard_number) as file, io.BufferedReader(file) as buffered:
                found = vectors_of(buffered, self.entries_of(shard_number), wanted)
        except TarFault as error:
            if self.drop_cached(shard_number):
                return self.vectors_of(shard_number, wanted)
            name = f"{self.index.place}/{self.index.shards[shard_number].name}"
            raise DataError(f"{name}: {error}; write the shards again") from error
        self._vectors[shard_number] = found
        if len(self._vectors) > OPEN_SHARDS:
            self._vectors.popitem(last=False)
        return found

    def drop_cached(self, shard_number: int) -> bool:
        """Drop a remote shard from the cache, once per process: a disk may have changed it. Returns whether it did."""
        if not isinstance(self.store, Remote) or shard_number in self._dropped:
            return False
        self._dropped.add(shard_number)
        shard = self.index.shards[shard_number]
        self.store.forget(shard.name, shard.sha256)
        self.store.forget(shard.entries_name, shard.entries_sha256)
        return True

    def load_entries(self, shard_number: int) -> Entries:
        """Read the entries of a shard. Raises DataError."""
        shard = self.index.shards[shard_number]
        try:
            with self._open_file(shard.entries_name, shard.entries_bytes, shard.entries_sha256) as file:
                return parse_entries(file.read(), shard, self.index.place)
        except DataError:
            if not self.drop_cached(shard_number):
                raise
            return self.load_entries(shard_number)

    def open_shard(self, shard_number: int) -> io.FileIO:
        """Open a shard's tar. Raises DataError."""
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

    def content(self, located: Located) -> bytes:
        """The bytes of a sample's image. Raises DataError."""
        try:
            if isinstance(self.store, Remote):
                with self.open_shard(located.shard) as file:
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
            self._files[shard_number] = self.open_shard(shard_number)
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        return self._files[shard_number]

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: no open files, and nothing that it can read again."""
        names = ("_entries", "_files", "_vectors")
        emptied: dict[str, Any] = {name: OrderedDict() for name in names}
        return {**self.__dict__, **emptied}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            file.close()
