"""Verification of shards against their index: sizes, hashes, the tar's structure and end, samples, and decoding."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.config import Dtype
from vaescale.data.index import CODES, INDEX, LATENTS, Entries, Shard, parse_entries, parse_index
from vaescale.data.making.foreign import kept_roles
from vaescale.data.making.storing import values_of
from vaescale.data.making.table import TABLE_KEYS
from vaescale.data.making.tar_sets import split_of_tar
from vaescale.data.pictures import PictureFault
from vaescale.data.sequences import frames_of
from vaescale.data.storage import Folder
from vaescale.data.tars import LATENT_EXTENSIONS, Roles, Sample, TarFault, samples
from vaescale.errors import DataError


class ShardFault(NamedTuple):
    """A fault of a shard and its position: the shard, a member (or empty) and a byte offset (or -1). words: a sentence."""

    shard: str
    member: str
    offset: int
    words: str


def verify_shards(
    place: str,
    *,
    deep: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, list[ShardFault]]:
    """Verify the shards of a folder. Returns the number of samples that its index names, and every fault.

    deep: decode every image; of latents and codes, only bytes and offsets are compared. progress: called with the number of shards done
    and of all shards. Raises DataError when there is no readable index.
    """
    place = place.removeprefix("file://")
    if "://" in place:
        raise DataError(
            f"{place} is a URL; its files are checked when they arrive, folders are verified here"
        )
    index = parse_index(Folder(place).read_index(INDEX), place)
    folder = Path(place).expanduser()
    tars = Path(index.tars) if index.tars else folder
    latents = index.made.get("kind") in (LATENTS, CODES)
    roles = Roles(LATENT_EXTENSIONS) if latents else kept_roles(index.made, index.class_names)
    dtype = index.values.dtype if deep and not latents else None
    faults = []
    with ThreadPoolExecutor(jobs) as pool:  # hashing and decoding release the interpreter's lock
        results = pool.map(lambda shard: _verify(folder, tars, shard, dtype=dtype, roles=roles), index.shards)
        for number, shard_faults in enumerate(results, start=1):
            faults += shard_faults
            if progress is not None:
                progress(number, len(index.shards))
    made_split = (
        index.made.get("split") if index.tars else None
    )  # other splits' tars may be in the same folder
    named = {shard.name for shard in index.shards}
    for path in sorted(tars.glob("*.tar")):
        other = made_split is not None and split_of_tar(path.name) != made_split
        if path.name not in named and not other:
            faults.append(ShardFault(path.name, "", -1, f"it is not in {INDEX}, so training does not see it"))
    return index.num_samples, faults


def kept_table(place: str) -> dict[str, Any] | None:
    """The table of images in the index of a folder (`table.py`); None in an index of an earlier version. Raises DataError."""
    place = place.removeprefix("file://")
    table = parse_index(Folder(place).read_index(INDEX), place).made.get("table")
    return table if isinstance(table, dict) and table.keys() >= TABLE_KEYS else None


def _verify(folder: Path, tars: Path, shard: Shard, *, dtype: Dtype | None, roles: Roles) -> list[ShardFault]:
    """dtype: of the values, which are decoded; None compares bytes only."""
    path = tars / shard.name
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size != shard.bytes:
                return [
                    ShardFault(shard.name, "", -1, f"{size} bytes, the index says {shard.bytes}"),
                    *_structure(path, roles),
                ]
    except OSError as error:
        return [ShardFault(shard.name, "", -1, f"it cannot be read: {error.strerror}")]
    return _compare(folder, path, shard, dtype=dtype, roles=roles)


def _structure(path: Path, roles: Roles) -> list[ShardFault]:
    """The faults of a tar itself and of its samples."""
    faults = []
    try:
        with path.open("rb") as file:
            faults = [
                _at(path.name, sample) for sample in samples(file, roles) if isinstance(sample, TarFault)
            ]
    except TarFault as error:
        faults.append(_at(path.name, error))
    return faults


def _compare(
    folder: Path, path: Path, shard: Shard, *, dtype: Dtype | None, roles: Roles
) -> list[ShardFault]:
    """Compare every sample of a tar with its entry."""
    faults = list[ShardFault]()
    with path.open("rb") as file:
        untouched = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    entries = _load_entries(folder, shard)
    if isinstance(entries, ShardFault):
        return [entries, *_structure(path, roles)]
    known = {bytes(entry["key"]): entry for entry in entries}
    try:
        with path.open("rb") as file:
            for sample in samples(file, roles):
                entry = known.pop(sample.key.encode(), None) if isinstance(sample, Sample) else None
                if entry is None and untouched:
                    continue  # the index of this very tar leaves it out: --skip-broken
                if isinstance(sample, TarFault):
                    faults.append(_at(shard.name, sample))
                elif message := _difference(sample, entry, dtype=dtype, roles=roles):
                    faults.append(ShardFault(shard.name, sample.key, sample.offset, message))
    except TarFault as error:
        faults.append(_at(shard.name, error))
        message = f"{len(known)} images of the index follow it in the tar and could not be compared"
        return [*faults, *([ShardFault(shard.name, "", -1, message)] if known else [])]
    for key, entry in known.items():
        message = "the index names it, but the tar has no such image"
        faults.append(ShardFault(shard.name, key.decode(errors="replace"), int(entry["offset"]), message))
    if not faults and not untouched:
        faults.append(ShardFault(shard.name, "", -1, "its sha256 is not the index's (outside of any image)"))
    return faults


def _difference(sample: Sample, entry: object, *, dtype: Dtype | None, roles: Roles) -> str:
    """The fault of a sample, as a phrase, or an empty string."""
    if entry is None:
        return "it is not in the index"
    offset, _, crc32, label = (entry[name] for name in ("offset", "bytes", "crc32", "label"))  # type: ignore[index]
    if sample.crc32 != crc32:
        return "its bytes are not those that were indexed"
    if sample.offset != offset or sample.label != label:
        return (
            f"byte {sample.offset} and class {sample.label}, the index says byte {offset} and class {label}"
        )
    if dtype is not None:
        try:
            if roles.of_sequences:
                frames_of(sample.content)
            else:
                values_of(sample.content, dtype)
        except PictureFault as error:
            return str(error)
    return ""


def _load_entries(folder: Path, shard: Shard) -> Entries | ShardFault:
    path = folder / shard.entries_name
    try:
        return parse_entries(path.read_bytes(), shard, str(folder))
    except DataError as error:
        return ShardFault(shard.name, "", -1, str(error))
    except OSError as error:
        return ShardFault(shard.name, "", -1, f"{path} cannot be read: {error.strerror}")


def _at(shard: str, fault: TarFault) -> ShardFault:
    return ShardFault(shard, fault.member, fault.offset, str(fault))
