"""Writing of items as WebDataset tars with an index: in parallel, whole shards at a time, and resumable.

A shard is written under a temporary name, read back strictly, and renamed; a note beside it (`.NAME.json`) says what
it was made from. A second start keeps the shards whose notes and hashes fit and writes the others; index.json comes
last. The notes are then kept in one file (`.made.json`), so that a shard that is damaged later can be written again.
"""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from vaescale.data.config import Crop, Filter
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
from vaescale.data.making.items import Item, open_item
from vaescale.data.pictures import (
    Encoding,
    Picture,
    PictureFault,
    decode,
    decode_foreign,
    encode,
    fit,
    is_known,
    read_header,
    to_channels,
)
from vaescale.data.tars import IMAGE_EXTENSIONS, TarFault, samples
from vaescale.errors import DataError, UserError
from vaescale.system.files import write_whole

IN_PROCESS = 2000  # below this many images, starting processes takes longer than the work
PROBED = 64
MAKING, NOTES = ".making.json", ".made.json"
MOST_HELD_BYTES = 1 << 30
MOST_CLASSES = 100_000
FOREIGN = "tars made by others"


def _quietly(done: int) -> None:
    """Report no progress."""


class Making(NamedTuple):
    """How images are cut to size and stored.

    size: pixels, None for the images' own. channels: 1, 3, or None for the images' own. encoding `keep` stores the
    files as they are. shard_samples: images per shard, unless
    shard_bytes gives its approximate size. skip_broken: leave out images that cannot be used.
    """

    size: int | None = None
    crop: Crop | None = None
    resample: Filter = "bicubic"
    channels: Literal[1, 3] | None = None
    encoding: Encoding | Literal["keep"] = "npy"
    quality: int = 95
    shard_samples: int = 1000
    shard_bytes: int | None = None
    skip_broken: bool = False

    def words(self) -> dict[str, Any]:
        """The settings that have an effect, for the index."""
        used = {name: value for name, value in self._asdict().items() if value is not None}
        unused = [
            *(["resample"] if self.size is None else []),
            *(["quality"] if self.encoding != "jpg" else []),
        ]
        unused += ["skip_broken", *(["shard_samples"] if self.shard_bytes is not None else [])]
        return {name: value for name, value in used.items() if name not in unused}


class Made(NamedTuple):
    """A written shard: its row, its images' shapes, and a sentence for each image that was left out."""

    shard: Shard | None
    shapes: list[list[int]]
    skipped: list[str]


class Written(NamedTuple):
    """The index of written shards, and a sentence for each image that was left out."""

    shards: ShardIndex
    skipped: list[str]


def write_shards(
    items: Iterable[Item],
    folder: Path,
    making: Making = Making(),  # noqa: B008  # a NamedTuple is frozen
    *,
    class_names: tuple[str, ...] = (),
    jobs: int = 1,
    progress: Callable[[int], None] = _quietly,
    made: dict[str, Any] | None = None,
) -> Written:
    """Write items as shards of `folder`; the same items and making give the same bytes.

    jobs: processes. progress: called with the number of items done. made: their origin, for the index.
    Raises DataError for the first image that cannot be used, unless making.skip_broken; and when none is left.
    """
    with _alone(folder):
        _refuse_other_making(folder, {**(made or {}), **making.words()})
        return _write_alone(items, folder, making, class_names, jobs, progress, made)


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
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in names)


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
    class_names: tuple[str, ...],
    jobs: int,
    progress: Callable[[int], None],
    made: dict[str, Any] | None,
) -> Written:
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
    for chunk_size, result in _in_order(_chunks(items, per_shard), folder, making, jobs):
        results.append(result)
        done += chunk_size
        progress(done)
    written = _write_index(folder, results, class_names, {**(made or {}), **making.words()})
    _sweep(folder, {shard.name for shard in written.shards.shards})
    return written


def write_part(items: list[Item], folder: Path, number: int, making: Making) -> Made:
    """Write shard `number` of a set that several processes write together; `write_index` completes it. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write_shard(items, folder / f"shard-{number:06d}.tar", making)


def write_index(folder: Path, parts: list[Made], made: dict[str, Any]) -> ShardIndex:
    """Write the index of what `write_part` wrote, in order. made: the origin, for the index."""
    written = _write_index(folder, parts, (), made)
    _sweep(folder, {shard.name for shard in written.shards.shards})
    return written.shards


def index_shards(
    folder: Path,
    *,
    skip_broken: bool = False,
    jobs: int = 1,
    progress: Callable[[int], None] = _quietly,
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
    with _pool(jobs if len(paths) > 1 else 1) as submit:
        pending = [submit(_index_one, path, skip_broken) for path in paths]
        for number, future in enumerate(pending, start=1):
            results.append(future.result())
            progress(number)
    labels = [int(_labels(folder, result.shard).max()) for result in results if result.shard is not None]
    names = tuple(map(str, range(1 + min(MOST_CLASSES, max(labels, default=-1)))))
    return _write_index(folder, results, names, {"source": FOREIGN})


def _labels(folder: Path, shard: Shard) -> NDArray[np.int32]:
    return parse_entries((folder / shard.entries_name).read_bytes(), shard, str(folder))["label"]


def make_index(folder: Path, path: Path, name: str) -> tuple[Shard | None, list[list[int]], list[TarFault]]:
    """Read a tar strictly and write the entries of shard `name`. Returns its row, its images' shapes, its unusable samples.

    Raises TarFault when the tar itself is not sound.
    """
    rows: list[tuple[int, int, int, int, str]] = []
    shapes: set[tuple[int, ...]] = set()
    faults: list[TarFault] = []
    with path.open("rb") as file:
        for sample in samples(file):
            if isinstance(sample, TarFault):
                faults.append(sample)
                # Samples that share a key are both left out.
                rows = [row for row in rows if row[4] != sample.key]
                continue
            try:
                shapes.add(read_header(sample.content)[1:])
            except PictureFault as error:
                faults.append(TarFault(str(error), member=sample.key, offset=sample.offset))
                continue
            rows.append((sample.offset, len(sample.content), sample.crc32, sample.label, sample.key))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        return None, [], faults
    content = entries_content(make_entries(rows))
    shard = Shard(name, size, sha256, len(rows), len(content), hashlib.sha256(content).hexdigest())
    write_whole(folder / shard.entries_name, content)
    return shard, sorted(map(list, shapes)), faults


def _index_one(path: Path, skip_broken: bool) -> Made:
    try:
        shard, shapes, faults = make_index(path.parent, path, path.name)
    except TarFault as error:
        raise DataError(f"{path}: {error}") from error
    if shard is None and not faults:
        raise DataError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)}); remove it")
    messages = [f"{path} member {fault.member!r} at byte {fault.offset}: {fault}" for fault in faults]
    if messages and not skip_broken:
        more = f", and {len(messages) - 1} more" if len(messages) > 1 else ""
        raise DataError(f"{messages[0]}{more}; mend it, or leave such samples out with --skip-broken")
    return Made(shard, shapes, messages)


def _write_index(
    folder: Path, results: list[Made], class_names: tuple[str, ...], made: dict[str, Any]
) -> Written:
    shards = [result.shard for result in results if result.shard is not None]
    skipped = [message for result in results for message in result.skipped]
    if not shards:
        raise DataError(
            f"no image to write to {folder}; check the source" + (f" ({skipped[0]})" if skipped else "")
        )
    shapes = {tuple(shape) for result in results for shape in result.shapes}
    image = next(iter(shapes)) if len(shapes) == 1 else None
    made = {**made, "skipped": len(skipped)}
    index = ShardIndex(str(folder), ShardTable.of(shards), image, class_names, made)  # type: ignore[arg-type]
    write_whole(folder / INDEX, index_content(index))
    return Written(index, skipped)


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
    for chunk in chunks:
        first.append(chunk)
        if sum(map(len, first)) > IN_PROCESS:
            break
    few = sum(map(len, first)) <= IN_PROCESS
    with _pool(1 if few else jobs) as submit:
        pending: list[tuple[list[Item], Future[Made]]] = []
        for number, chunk in enumerate(chain(first, chunks)):
            path = folder / f"shard-{number:06d}.tar"
            pending.append((chunk, submit(_write_shard, chunk, path, making)))
            while len(pending) > 2 * jobs or (len(pending) > 1 and _held(pending) > MOST_HELD_BYTES):
                done, future = pending.pop(0)
                yield len(done), future.result()
        for done, future in pending:
            yield len(done), future.result()


def _held(pending: list[tuple[list[Item], Future[Made]]]) -> int:
    """Bytes of images from a stream that wait to be written."""
    contents = (item.content for chunk, _ in pending for item in chunk)
    return sum(len(content) for content in contents if isinstance(content, bytes))


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


@contextmanager
def _pool(jobs: int) -> Iterator[Callable[..., Future[Any]]]:
    """Yield `submit(function, *arguments)` to `jobs` processes; with one job, this process does the work at once."""
    if jobs <= 1:
        yield _at_once
        return
    # Not forked: a source may have threads of its own, and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts)
    try:
        yield pool.submit
    except BrokenProcessPool as error:
        raise DataError(
            "a writing process was killed, perhaps for memory; lower --jobs and repeat the command"
        ) from error
    except BaseException:
        # Shards under way are abandoned: one may take minutes, and is written again.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the first one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _at_once(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def _write_shard(items: list[Item], path: Path, making: Making) -> Made:
    note = path.with_name(f".{path.name}.json")
    origin = _origin(items, making)
    if (kept := _kept(note, path, origin)) is not None and (making.skip_broken or not kept.skipped):
        return kept
    from webdataset import TarWriter

    temporary = path.with_name(f".{path.name}.tmp")
    skipped = []
    with (
        temporary.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for item in items:
            try:
                extension, content = _prepare(item, making)
            except PictureFault as error:
                message = f"{_name(item)}: {error}"
                if not making.skip_broken:
                    raise DataError(
                        f"{message}; mend it, or leave such images out with --skip-broken"
                    ) from error
                skipped.append(message)
                continue
            label = {"cls": str(item.label).encode()} if item.label >= 0 else {}
            tar.write({"__key__": item.key, **label, extension: content})
    try:
        shard, shapes, faults = make_index(path.parent, temporary, path.name)
    except TarFault as error:
        raise DataError(f"{temporary} was not written soundly: {error}") from error
    if faults:
        raise DataError(f"{faults[0].member!r} cannot be written: {faults[0]}; give it another name")
    with temporary.open("rb") as whole:
        os.fsync(whole.fileno())
    temporary.replace(path)
    made = Made(shard, shapes, skipped)
    if shard is None:
        path.unlink()
    write_whole(note, json.dumps({"origin": origin, "made": made}).encode())
    return made


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
        content = item.content
        if isinstance(content, np.ndarray):
            digest.update(repr(content.shape).encode() + content.tobytes())
        elif isinstance(content, bytes):
            digest.update(content)
        else:
            with suppress(OSError):  # a missing file is reported when it is opened
                status = content.path.stat()
                digest.update(f"{content} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _prepare(item: Item, making: Making) -> tuple[str, bytes]:
    """The extension and the bytes of an item's image. Raises PictureFault."""
    content = open_item(item)
    foreign = isinstance(content, bytes) and not is_known(content)
    image: Picture = (
        content
        if isinstance(content, np.ndarray)
        else decode_foreign(content)
        if foreign
        else decode(content)
    )
    if making.encoding == "keep":
        if isinstance(content, np.ndarray):
            return "npy", encode(image, "npy")
        return ("png", encode(image, "png")) if foreign else (read_header(content).format, content)
    if making.size is not None:
        image = fit(image, size=making.size, crop=making.crop, resample=making.resample)
    if making.channels is not None:
        image = to_channels(image, making.channels, grey_from_colour=True)
    return making.encoding, encode(image, making.encoding, quality=making.quality)


def _samples_per_shard(probe: list[Item], making: Making) -> int:
    """The number of samples with which a shard has about making.shard_bytes, estimated from the first images."""
    sizes = []
    for item in probe:
        try:
            sizes.append(len(_prepare(item, making)[1]))
        except PictureFault:
            continue  # it is counted or refused when it is written
    content = sum(sizes) / max(1, len(sizes))
    headers = 3 * 512 + 256  # two members' headers, the class, and padding of half a block
    return max(1, int((making.shard_bytes or 0) / (content + headers)))


def _name(item: Item) -> str:
    return str(item.content.path) if hasattr(item.content, "path") else f"image {item.key}"
