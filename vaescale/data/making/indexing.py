"""The index of tars: of those that were written here, and of those made by others."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.index import (
    INDEX,
    Shard,
    ShardIndex,
    ShardTable,
    entries_content,
    index_content,
    make_entries,
    parse_entries,
    parse_index,
)
from vaescale.data.making.pool import pool_of
from vaescale.data.making.remarks import kept_remarks, noteworthy
from vaescale.data.pictures import PictureFault, read_header
from vaescale.data.tars import IMAGE_EXTENSIONS, TarFault, samples
from vaescale.errors import DataError, UserError
from vaescale.system.files import write_whole

MOST_CLASSES = 100_000
FOREIGN = "tars made by others"


class Made(NamedTuple):
    """A written shard: its row, its images' shapes, a sentence for each image that was left out, and counts (`remarks.py`)."""

    shard: Shard | None
    shapes: list[list[int]]
    skipped: list[str]
    remarks: dict[str, int] = {}  # noqa: RUF012  # never changed


class Written(NamedTuple):
    """The index of written shards, a sentence for each image that was left out, and counts of remarkable ones (`remarks.py`)."""

    shards: ShardIndex
    skipped: list[str]
    remarks: dict[str, int] = {}  # noqa: RUF012  # never changed


def quietly(done: int) -> None:
    """Report no progress."""


def index_shards(
    folder: Path,
    *,
    skip_broken: bool = False,
    jobs: int = 1,
    progress: Callable[[int], None] = quietly,
) -> Written:
    """Write the index of the tars in `folder`, made by others, beside them.

    progress: called with the number of shards done. Raises DataError for a tar that is not sound and for a sample that
    cannot be used; with skip_broken such samples are left out.
    """
    with suppress(DataError, OSError):
        before = parse_index((folder / INDEX).read_bytes(), str(folder)).made.get("source")
        if before != FOREIGN:
            remedy = f"delete {folder / INDEX} to index it again, without the classes' names"
            raise UserError(f"{folder} has an index already (of {before}); {remedy}")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        near = [
            path.name
            for path in [*folder.glob("*.tar.*"), *folder.glob("*.tgz")]
            if not path.name.endswith(".npy")
        ]
        inner = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        why = f"; unpack {near[0]} first" if near else f"; did you mean {inner[0]}?" if inner else ""
        raise DataError(f"{folder} holds no .tar files{why or '; give the folder of the shards'}")
    results = []
    with pool_of(jobs if len(paths) > 1 else 1) as submit:
        pending = [submit(_index_one, path, skip_broken) for path in paths]
        for number, future in enumerate(pending, start=1):
            results.append(future.result())
            progress(number)
    labels = [int(_labels(folder, result.shard).max()) for result in results if result.shard is not None]
    names = tuple(map(str, range(1 + min(MOST_CLASSES, max(labels, default=-1)))))
    return complete(folder, results, names, {"source": FOREIGN})


def _labels(folder: Path, shard: Shard) -> NDArray[np.int32]:
    return parse_entries((folder / shard.entries_name).read_bytes(), shard, str(folder))["label"]


def make_index(
    folder: Path, path: Path, name: str
) -> tuple[Shard | None, list[list[int]], list[TarFault], Counter[str]]:
    """Read a tar strictly and write the entries of shard `name`.

    Returns its row, its images' shapes, its unusable samples, and counts of what is remarkable in the headers of its images.

    Raises TarFault when the tar itself is not sound.
    """
    rows: list[tuple[int, int, int, int, str]] = []
    shapes: set[tuple[int, ...]] = set()
    faults: list[TarFault] = []
    remarks = Counter[str]()
    with path.open("rb") as file:
        for sample in samples(file):
            if isinstance(sample, TarFault):
                faults.append(sample)
                # Samples that share a key are both left out.
                rows = [row for row in rows if row[4] != sample.key]
                continue
            try:
                header = read_header(sample.content)
            except PictureFault as error:
                faults.append(TarFault(str(error), member=sample.key, offset=sample.offset))
                continue
            shapes.add(header.shape)
            remarks.update(kept_remarks(sample.content, header))
            rows.append((sample.offset, len(sample.content), sample.crc32, sample.label, sample.key))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        return None, [], faults, remarks
    content = entries_content(make_entries(rows))
    shard = Shard(name, size, sha256, len(rows), len(content), hashlib.sha256(content).hexdigest())
    write_whole(folder / shard.entries_name, content)
    return shard, sorted(map(list, shapes)), faults, remarks


def _index_one(path: Path, skip_broken: bool) -> Made:
    try:
        shard, shapes, faults, remarks = make_index(path.parent, path, path.name)
    except TarFault as error:
        raise DataError(f"{path}: {error}") from error
    if shard is None and not faults:
        raise DataError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)}); remove it")
    messages = [f"{path} member {fault.member!r} at byte {fault.offset}: {fault}" for fault in faults]
    if messages and not skip_broken:
        more = f", and {len(messages) - 1} more" if len(messages) > 1 else ""
        raise DataError(f"{messages[0]}{more}; mend it, or leave such samples out with --skip-broken")
    return Made(shard, shapes, messages, dict(remarks))


def complete(
    folder: Path, results: list[Made], class_names: tuple[str, ...], made: dict[str, Any]
) -> Written:
    """Write index.json over shards. made: their origin. Raises DataError when no image is left."""
    shards = [result.shard for result in results if result.shard is not None]
    skipped = [message for result in results for message in result.skipped]
    if not shards:
        raise DataError(
            f"no image to write to {folder}; check the source" + (f" ({skipped[0]})" if skipped else "")
        )
    shapes = {tuple(shape) for result in results for shape in result.shapes}
    image = next(iter(shapes)) if len(shapes) == 1 else None
    remarks = Counter[str]()
    for result in results:
        remarks.update(result.remarks)
    told = noteworthy(remarks)
    made = {**made, "skipped": len(skipped), **({"pictures": told} if told else {})}
    index = ShardIndex(str(folder), ShardTable.of(shards), image, class_names, made)  # type: ignore[arg-type]
    write_whole(folder / INDEX, index_content(index))
    return Written(index, skipped, dict(remarks))
