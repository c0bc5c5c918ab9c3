"""Latents as WebDataset shards with the same index as images: KEY.moments.npy and, where there is a class, KEY.cls.

moments.npy is float32 [2, ...latent shape]: the mean and the log variance of q(z|x). Where q(z|x) is not Gaussian, as for several
groups of a ladder together, the member is KEY.draws.npy, float32 [S, ...latent shape]. Latents that were prepared for another
model may have another dtype (see `latent_format.py`) and be standardized. index.json's `made` names the run and the images of
the latents, and their scale.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.index import (
    CODES,
    INDEX,
    LATENTS,
    Shard,
    ShardIndex,
    ShardTable,
    entries_content,
    index_content,
    make_entries,
    parse_entries,
    parse_index,
)
from vaescale.data.latent_format import (
    LATENT_DTYPES,
    VALUE_BYTES,
    LatentDtype,
    extension,
    from_stored,
    header,
    to_stored,
)
from vaescale.data.tars import LATENT_EXTENSIONS, Roles, TarFault, samples
from vaescale.errors import DataError
from vaescale.system.files import remove_abandoned, replacing, sync, write_whole


class Block(NamedTuple):
    """The latents of one shard, flat.

    labels: classes (-1: none), int64 [n]; moments: float32 [n, 2, Z] of means and log variances, or [n, S, Z] of draws.
    """

    keys: list[str]
    labels: NDArray[np.int64]
    moments: NDArray[np.float32]


class Standardized(NamedTuple):
    """The scale of standardized latents, by channel: stored = (z - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class _FileIdentity(NamedTuple):
    """The identity of a checked file: what changes when it is written or replaced, and the sha256 of its bytes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    sha256: str


SETTLED_NS = 3_000_000_000  # a file written within the clock tick of its check may change without a new modification time
_verified: dict[Path, _FileIdentity] = {}


@dataclass(frozen=True)
class LatentShards:
    """Latents in a folder, with their index.

    shape: of an image's latents, (Z,) or (C, H, W); draws: the number of draws per image, 0 where the shards hold moments;
    dtype: of the stored values; standardized: their scale, None where they are the model's own latents.
    """

    index: ShardIndex
    folder: Path
    shape: tuple[int, ...]
    draws: int = 0
    dtype: LatentDtype = "float32"
    standardized: Standardized | None = None

    @property
    def header(self) -> bytes:
        """The bytes before the values of a member."""
        return header((self.draws or 2, *self.shape), draws=self.draws > 0, dtype=self.dtype)

    @property
    def member_bytes(self) -> int:
        """The size of a member."""
        values = (self.draws or 2) * int(np.prod(self.shape))
        return len(self.header) + VALUE_BYTES[self.dtype] * values

    def read(self, number: int) -> Block:
        """Read one shard and check its bytes against the index. Raises DataError.

        The sha256 of a file that has not changed is computed once in a process, not at each pass over the latents.
        """
        shard = self.index.shards[number]
        try:
            entries = parse_entries((self.folder / shard.entries_name).read_bytes(), shard, str(self.folder))
            content = _read_verified(self.folder / shard.name, shard)
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: {error.strerror}; encode the run again"
            ) from error
        begin, size = self.header, self.member_bytes
        if (entries["bytes"] != size).any():
            raise DataError(
                f"{self.folder / shard.name} holds latents of another shape; encode the run again"
            )
        first, stride = int(entries["offset"][0]), 0
        steps = np.diff(entries["offset"])
        if len(steps) == 0 or (steps == steps[0]).all():
            stride = int(steps[0]) if len(steps) else size
            rows = np.lib.stride_tricks.as_strided(
                content[first:], (len(entries), size), (stride, 1), writeable=False
            )
        else:  # a long key adds headers to its member
            rows = np.stack([content[entry["offset"] :][: entry["bytes"]] for entry in entries])
        if (rows[:, : len(begin)] != np.frombuffer(begin, np.uint8)).any():
            raise DataError(f"{self.folder / shard.name} does not hold latents; encode the run again")
        values = from_stored(rows[:, len(begin) :], self.dtype)
        moments = values.reshape(len(rows), self.draws or 2, -1)
        if not np.isfinite(moments).all():
            raise DataError(f"{self.folder / shard.name} holds NaN or Inf; encode the run again")
        keys = [key.decode(errors="replace") for key in entries["key"]]
        return Block(keys, entries["label"].astype(np.int64), moments)


def write_latents(
    folder: Path,
    name: str,
    *,
    keys: Sequence[str],
    labels: NDArray[np.int64],
    moments: NDArray[np.float32],
    draws: bool = False,
    dtype: LatentDtype = "float32",
) -> Shard:
    """Write one shard and its entries, whole or not at all. Returns its row.

    moments: [n, 2, ...latent shape], or, of draws, [n, S, ...latent shape]. Raises DataError when the dtype cannot hold them.
    """
    begin = header(moments.shape[1:], draws=draws, dtype=dtype)
    contents = (begin + values.tobytes() for values in to_stored(moments, dtype))
    ending = extension(draws=draws, dtype=dtype)
    return write_members(folder, name, keys=keys, labels=labels, contents=contents, ending=ending)


def write_members(
    folder: Path,
    name: str,
    *,
    keys: Sequence[str],
    labels: NDArray[np.int64],
    contents: Iterable[bytes],
    ending: str,
) -> Shard:
    """Write one shard of members KEY.ENDING and its entries, whole or not at all. Returns its row."""
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as temporary:
        with (
            temporary.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
        ):
            for key, label, content in zip(keys, labels.tolist(), contents, strict=True):
                classes = {"cls": str(label).encode()} if label >= 0 else {}
                tar.write({"__key__": key, **classes, ending: content})
        rows = []
        with temporary.open("rb") as whole:
            for sample in samples(whole, Roles(LATENT_EXTENSIONS)):  # read back strictly, as any tar is
                if isinstance(sample, TarFault):
                    raise DataError(f"the latents of {sample.member!r} cannot be written: {sample}")
                rows.append((sample.offset, len(sample.content), sample.crc32, sample.label, sample.key))
            whole.seek(0)
            sha256, size = hashlib.file_digest(whole, "sha256").hexdigest(), whole.seek(0, os.SEEK_END)
        entries = entries_content(make_entries(rows))
        shard = Shard(name, size, sha256, len(rows), len(entries), hashlib.sha256(entries).hexdigest())
        write_whole(folder / shard.entries_name, entries)
        sync(temporary)
    sync(folder)
    return shard


def write_latent_index(
    folder: Path, shards: Sequence[Shard], class_names: tuple[str, ...], made: dict[str, Any]
) -> ShardIndex:
    """Write index.json, which makes the shards a data set, and delete shards that it does not list.

    made: may name another kind than latents. Temporary files of other writers that are still alive stay.
    """
    index = ShardIndex(str(folder), ShardTable.of(shards), None, class_names, {"kind": LATENTS, **made})
    kept = {name for shard in shards for name in (shard.name, shard.entries_name)}
    for path in [*folder.glob("*.tar"), *folder.glob("*.index.npy")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
    remove_abandoned(folder)
    write_whole(folder / INDEX, index_content(index))
    return index


def open_latents(folder: Path) -> LatentShards:
    """Open the latents in a folder. Raises DataError when it holds none."""
    try:
        index = parse_index((folder / INDEX).read_bytes(), str(folder))
    except OSError:
        raise DataError(f"{folder} holds no latents; write them with `vaescale encode RUN`") from None
    return latents_of_index(index, folder)


def latents_of_index(index: ShardIndex, folder: Path) -> LatentShards:
    """The latents that an index describes. Raises DataError when it describes none, or a dtype or scale that is not known."""
    made: dict[str, Any] = index.made
    if made.get("kind") == CODES:
        raise DataError(
            f"{folder} holds codes, and latents with a density are needed; codes are for `vaescale fit-prior`, and for "
            "vaescale.load(RUN).decode"
        )
    shape: Any = made.get("latent_shape")
    draws: Any = made.get("draws", 0)
    known = made.get("kind") == LATENTS and isinstance(shape, list) and bool(shape)
    if (
        not known
        or not all(type(size) is int and 0 <= size < 1 << 24 for size in [*shape, draws])
        or 0 in shape
    ):
        raise DataError(f"{folder} holds no latents; give a folder that `vaescale encode` wrote")
    dtype = made.get("dtype", "float32")
    if dtype not in LATENT_DTYPES:
        raise DataError(
            f"{folder} holds latents of dtype {dtype!r}, and this version reads {', '.join(LATENT_DTYPES)}; encode the run again"
        )
    return LatentShards(
        index, folder, tuple(shape), draws, dtype, _scale(made.get("standardized"), shape[0], folder)
    )


def _scale(stored: Any, channels: int, folder: Path) -> Standardized | None:
    """The scale of standardized latents from the index. Raises DataError when it has another form."""
    if stored is None:
        return None
    try:
        mean, std = (tuple(map(float, stored[name])) for name in ("mean", "std"))
    except (TypeError, KeyError, ValueError):
        mean = std = ()
    if (
        len(mean) != channels
        or len(std) != channels
        or not min(std) > 0
        or not np.isfinite([*mean, *std]).all()
    ):
        raise DataError(
            f"{folder} holds latents that are standardized in a way that this version does not know; encode the run again"
        )
    return Standardized(mean, std)


def _read_verified(path: Path, shard: Shard) -> NDArray[np.uint8]:
    """The bytes of a shard, hashed unless this process has hashed the same file before. Raises DataError."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        content = np.fromfile(file, np.uint8)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    identity = _FileIdentity(status.st_size, *times, status.st_ino, status.st_dev, shard.sha256)
    is_whole = len(content) == shard.bytes
    if is_whole and _verified.get(path.absolute()) == identity:
        return content
    if not is_whole or hashlib.sha256(content.data).hexdigest() != shard.sha256:
        raise DataError(f"{path} is not what was indexed; delete {path.parent} and encode again")
    if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
        _verified[path.absolute()] = identity
    return content
