"""Writing of items as WebDataset tars with an index: in parallel, whole shards at a time, and resumable.

A shard is written under a temporary name, read back strictly, and renamed; a note beside it (`.NAME.json`) says what
it was made from. A second start keeps the shards whose notes and hashes fit and writes the others; index.json comes
last. The notes are then kept in one file (`.made.json`), so that a shard that is damaged later can be written again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from vaescale.data.index import INDEX, Shard, ShardIndex
from vaescale.data.making.indexing import Made, Written, complete, make_index, quietly
from vaescale.data.making.items import Clip, Item, name_of
from vaescale.data.making.pool import pool_of
from vaescale.data.making.storing import Making, header_check, prepare
from vaescale.data.making.table import NOTHING, Counts
from vaescale.data.pictures import PictureFault
from vaescale.data.sequences import EXTENSION
from vaescale.data.tars import USUAL, Roles, TarFault
from vaescale.errors import DataError, UserError
from vaescale.system.files import write_whole

IN_PROCESS = 2000  # below this many images, starting processes takes longer than the work
PROBED = 64
TRIED = 100  # images, after which it is likely that none can be used
MAKING, NOTES = ".making.json", ".made.json"
MOST_HELD_BYTES = 1 << 30


def write_shards(
    items: Iterable[Item],
    folder: Path,
    making: Making = Making(),  # noqa: B008  # a NamedTuple is frozen
    *,
    class_names: tuple[str, ...] = (),
    jobs: int = 1,
    progress: Callable[[int], None] = quietly,
    made: dict[str, Any] | None = None,
    left_out: Mapping[str, int] = NOTHING,
) -> Written:
    """Write items as shards of `folder`; the same items and making give the same bytes.

    jobs: processes. progress: called with the number of items done, 0 at first. made: their origin, for the index. left_out:
    numbers of files that are no images, for the table of the index.
    Raises DataError for the first image that cannot be used, unless making.skip_broken; and when none is left.
    """
    with _alone(folder):
        _refuse_other_making(folder, {**(made or {}), **making.words()})
        results = _write_alone(items, folder, making, jobs, progress)
        written = complete(
            folder, results, class_names, {**(made or {}), **making.words()}, left_out=left_out
        )
        _sweep(folder, {shard.name for shard in written.shards.shards})
        return written


def _refuse_other_making(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings in an unfinished folder. Raises UserError when its shards were made with others."""
    path, before = folder / MAKING, settings
    with suppress(OSError, ValueError):
        before = json.loads(path.read_bytes())
    if (changed := differing(before, settings)) and any(folder.glob(".shard-*.tar.json")):
        raise UserError(
            f"{folder} holds unfinished shards that were made otherwise ({changed}); delete it or choose another OUT"
        )
    write_whole(path, json.dumps(settings).encode())


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences of two makings as `name old -> new`, or an empty string."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in names)


def damaged_shards(index: ShardIndex, folder: Path) -> list[str]:
    """The shards of an index whose files are missing or have another size."""
    damaged = []
    for shard in index.shards:
        try:
            sizes = ((folder / shard.name).stat().st_size, (folder / shard.entries_name).stat().st_size)
        except OSError:
            sizes = (-1, -1)
        if sizes != (shard.bytes, shard.entries_bytes):
            damaged.append(shard.name)
    return damaged


def _write_alone(
    items: Iterable[Item],
    folder: Path,
    making: Making,
    jobs: int,
    progress: Callable[[int], None],
) -> list[Made]:
    with suppress(OSError, ValueError):
        # A finished set with damaged files: its sound shards count as written.
        for name, note in json.loads((folder / NOTES).read_bytes()).items():
            write_whole(folder / f".{os.path.basename(name)}.json", json.dumps(note).encode())
        (folder / INDEX).unlink(missing_ok=True)
        (folder / NOTES).unlink()
    items = iter(items)
    per_shard = making.shard_samples
    if making.shard_bytes is not None:
        probe = list(islice(items, PROBED))
        items, per_shard = chain(probe, items), _samples_per_shard(probe, making)
    results: list[Made] = []
    done = 0
    progress(done)
    for chunk_size, result in _in_order(_chunks(items, per_shard), folder, making, jobs):
        results.append(result)
        done += chunk_size
        progress(done)
    return results


def write_part(items: list[Item], folder: Path, number: int, making: Making) -> Made:
    """Write shard `number` of a set that several processes write together; `write_index` completes it. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write_shard(items, folder / f"shard-{number:06d}.tar", making)


def write_index(folder: Path, parts: list[Made], made: dict[str, Any]) -> ShardIndex:
    """Write the index of what `write_part` wrote, in order. made: the origin, for the index."""
    written = complete(folder, parts, (), made)
    _sweep(folder, {shard.name for shard in written.shards.shards})
    return written.shards


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def _in_order(
    chunks: Iterable[list[Item]], folder: Path, making: Making, jobs: int
) -> Iterator[tuple[int, Made]]:
    """Write the chunks and yield the results in order, with at most two chunks per process under way."""
    chunks = iter(chunks)
    first: list[list[Item]] = []
    few = True
    for chunk in chunks:
        first.append(chunk)
        if sum(map(len, first)) > IN_PROCESS or _held(first) > MOST_HELD_BYTES:
            few = False
            break
    with pool_of(1 if few else jobs) as submit:
        pending: list[tuple[list[Item], Future[Made]]] = []
        for number, chunk in enumerate(chain(first, chunks)):
            path = folder / f"shard-{number:06d}.tar"
            pending.append((chunk, submit(_write_shard, chunk, path, making)))
            while len(pending) > 2 * jobs or (
                len(pending) > 1 and _held([chunk for chunk, _ in pending]) > MOST_HELD_BYTES
            ):
                done, future = pending.pop(0)
                yield len(done), future.result()
        for done, future in pending:
            yield len(done), future.result()


def _held(chunks: list[list[Item]]) -> int:
    """Bytes of images from a stream that wait to be written."""
    contents = (
        content
        for chunk in chunks
        for item in chunk
        for content in (item.content.frames if isinstance(item.content, Clip) else (item.content,))
    )
    return sum(
        content.nbytes if isinstance(content, np.ndarray) else len(content)
        for content in contents
        if isinstance(content, bytes | np.ndarray)
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second writer of a folder within the block."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process writes to {folder}; wait for it or choose another OUT") from None
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


def _write_shard(items: list[Item], path: Path, making: Making) -> Made:
    note = path.with_name(f".{path.name}.json")
    origin = _origin(items, making)
    if (kept := _kept(note, path, origin)) is not None and (making.skip_broken or not kept.skipped):
        return kept
    from webdataset import TarWriter

    temporary = path.with_name(f".{path.name}.tmp")
    skipped = []
    remarks, counts = Counter[str](), Counts()
    with (
        temporary.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for item in items:
            try:
                image = prepare(item, making)
            except PictureFault as error:
                message = f"{name_of(item)}: {error}"
                if not making.skip_broken:
                    raise DataError(f"{message}; {_remedy(items, path.parent, making, error)}") from error
                skipped.append(message)
                counts.fault(error.reason, message)
                continue
            remarks.update(image.remarks)
            counts.image(image.shape, item.label)
            label = {"cls": str(item.label).encode()} if item.label >= 0 else {}
            tar.write({"__key__": item.key, **label, image.extension: image.content, **dict(item.members)})
    try:
        of_sequences = any(isinstance(item.content, Clip) for item in items)
        check = header_check(making.dtype, of_sequences=of_sequences)
        roles = Roles((EXTENSION,)) if of_sequences else USUAL
        shard, shapes, faults, _, bounds, sequences = make_index(
            path.parent, temporary, path.name, roles, check, dtype=making.dtype
        )
    except TarFault as error:
        raise DataError(f"{temporary} was not written soundly: {error}") from error
    if faults:
        raise DataError(f"{faults[0].member!r} cannot be written: {faults[0]}; give it another name")
    with temporary.open("rb") as whole:
        os.fsync(whole.fileno())
    temporary.replace(path)
    made = Made(shard, shapes, skipped, dict(remarks), counts.content(), bounds, sequences)
    if shard is None:
        path.unlink()
    write_whole(note, json.dumps({"origin": origin, "made": made}).encode())
    return made


def _remedy(items: list[Item], folder: Path, making: Making, fault: PictureFault) -> str:
    """What to do about an image that cannot be used: to leave such images out helps only where others can be used."""
    helps = "mend it, or leave such images out with --skip-broken"
    if any(folder.glob("shard-*.tar")):
        return helps
    tried = items[:TRIED]
    for item in tried:
        with suppress(PictureFault):
            prepare(item, making)
            return helps
    convert = "" if fault.reason == "transparency" else "; convert them first"
    return f"none of the first {len(tried)} images of its shard can be used{convert}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(folder: Path, kept: set[str]) -> None:
    """Gather the notes in one file, and remove what an earlier start left."""
    notes = {}
    for note in sorted(folder.glob(".shard-*.tar.json")):
        name = note.name.removeprefix(".").removesuffix(".json")
        if name in kept:
            notes[name] = json.loads(note.read_bytes())
        else:
            for leftover in (folder / name, folder / f"{name.removesuffix('.tar')}.index.npy"):
                leftover.unlink(missing_ok=True)
    write_whole(folder / NOTES, json.dumps(notes).encode())
    for leftover in [*folder.glob(".shard-*.tar.json"), *folder.glob(".shard-*.tar.tmp"), folder / MAKING]:
        leftover.unlink(missing_ok=True)


def _kept(note: Path, path: Path, origin: str) -> Made | None:
    """The shard that an earlier start made of the same items; None where it is absent or not whole."""
    try:
        content = json.loads(note.read_bytes())
        made = Made(*content["made"])
        made = made._replace(shard=made.shard and Shard(*made.shard))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if content["origin"] != origin:
        return None
    if made.shard is None:
        return made
    try:
        hashes = [_sha256(path), _sha256(path.with_name(made.shard.entries_name))]
    except OSError:
        return None
    return made if hashes == [made.shard.sha256, made.shard.entries_sha256] else None


def _origin(items: list[Item], making: Making) -> str:
    """A hash that identifies a shard's content: the making, and each item's key, class and file or values."""
    digest = hashlib.sha256(repr(making._replace(skip_broken=False)).encode())
    for item in items:
        digest.update(f"\n{item.key} {item.label} ".encode())
        for name, member in item.members:
            digest.update(f"{name} ".encode() + member)
        for content in item.content.frames if isinstance(item.content, Clip) else (item.content,):
            if isinstance(content, np.ndarray):
                digest.update(repr(content.shape).encode() + content.tobytes())  # the type is the making's
            elif isinstance(content, bytes):
                digest.update(content)
            else:
                with suppress(OSError):  # a missing file is reported when it is opened
                    status = content.path.stat()
                    digest.update(f"{content} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _samples_per_shard(probe: list[Item], making: Making) -> int:
    """The number of samples with which a shard has about making.shard_bytes, estimated from the first images."""
    sizes = []
    for item in probe:
        try:
            sizes.append(len(prepare(item, making).content))
        except PictureFault:
            continue  # it is counted or refused when it is written
    content = sum(sizes) / max(1, len(sizes))
    headers = 3 * 512 + 256  # two members' headers, the class, and padding of half a block
    return max(1, int((making.shard_bytes or 0) / (content + headers)))
