"""The index of tars: of those that were written here, and of those made by others."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaescale.config import Dtype
from vaescale.data.index import (
    INDEX,
    SEQUENCES,
    Shard,
    ShardIndex,
    ShardTable,
    Values,
    entries_content,
    index_content,
    make_entries,
    parse_entries,
)
from vaescale.data.making.foreign import (
    MOST_CLASSES,
    Survey,
    choose,
    labels_of,
    noted,
    survey,
    unpacked_headers,
)
from vaescale.data.making.pool import in_order, pool_of
from vaescale.data.making.remarks import kept_remarks, noteworthy
from vaescale.data.making.storing import header_check, values_of
from vaescale.data.making.table import Counts
from vaescale.data.making.tar_sets import FOREIGN, TarSet, find_tars
from vaescale.data.pictures import Header, PictureFault, decode, read_header
from vaescale.data.pictures.decoder import FLATTEN
from vaescale.data.tars import IMAGE_EXTENSIONS, USUAL, Member, Roles, TarFault, groups, samples
from vaescale.errors import DataError, UserError
from vaescale.system.console import say
from vaescale.system.files import write_whole

MOST_HEADER_BYTES = 1 << 28  # of compressed headers that are held; those of more tars are read twice
NAMED = 3  # shapes that a sentence names
MOST_TRIED = 10_000  # samples, after which a set without a usable one is given up
REMEDIES = {
    "order": "write the tars sorted by name (tar --sort=name)",
    "twice": "give each sample of a tar a key of its own",
    "missing": "copy the missing frames, and pack the tars again",
    "link": "store the files themselves (tar --dereference --hard-dereference)",
    "class": "leave the classes out with --class-member none",
    "image": "name one member of each sample with --image-member",
    "depth": "convert them to 8 bits per channel",
    "shape": "save them as uint8, uint16, int16 or float32 [H, W, C]",
    "format": "unpack the tars, and write shards of their files with `vaescale make-shards folder:DIR OUT`",
    "transparency": "unpack the tars, and write shards of their files with `vaescale make-shards folder:DIR OUT --flatten white`",
}


class Made(NamedTuple):
    """A written shard: its row, its images' shapes, a sentence for each image that was left out, and counts (`remarks.py`).

    counts: for the table (`table.py`); None in notes of earlier versions. bounds: the least and the greatest value, of other types than
    uint8. sequences: their numbers by FRAMESxHEIGHTxWIDTHxCHANNELS.
    """

    shard: Shard | None
    shapes: list[list[int]]
    skipped: list[str]
    remarks: dict[str, int] = {}  # noqa: RUF012  # never changed
    counts: dict[str, Any] | None = None
    bounds: tuple[float, float] | None = None
    sequences: dict[str, int] = {}  # noqa: RUF012  # never changed


class Unusable(NamedTuple):
    """A sample of a tar that cannot be used: the reason, one of those of TarFault and PictureFault, and a sentence."""

    reason: str
    message: str


class Indexed(NamedTuple):
    """A tar of others, indexed. doubtful: the number of indexed images that reading will leave out, by reason."""

    made: Made
    unusable: list[Unusable]
    doubtful: Counter[str]


class Written(NamedTuple):
    """The index of written shards, a sentence for each image that was left out, and counts of remarkable ones (`remarks.py`)."""

    shards: ShardIndex
    skipped: list[str]
    remarks: dict[str, int] = {}  # noqa: RUF012  # never changed


def quietly(done: int) -> None:
    """Report no progress."""


def index_shards(folder: Path, *, index_dir: Path | None = None, **options: Any) -> Written:
    """Write the index of the tars of one split: `index_tars` for a folder. index_dir: its folder, if it is another one."""
    (written,) = index_tars(find_tars(folder, index_dir), **options).values()
    return written


def index_tars(
    sets: dict[str, TarSet],
    *,
    image_member: str | None = None,
    class_member: str | None = None,
    skip_broken: bool = False,
    dtype: Dtype = "uint8",
    jobs: int = 1,
    progress: Callable[[int], None] = quietly,
) -> dict[str, Written]:
    """Write the index of each set of tars made by others, with the same numbers for the same classes.

    image_member: extensions of the images, separated by commas; class_member: a place of the classes, as in `tars.Roles`; by
    default what the samples have decides. dtype: the type of the images' values. progress: called with the number of shards done. Raises DataError for a tar that is
    not sound and for a sample that cannot be used; with skip_broken such samples are left out.
    """
    labels = labels_of(class_member)
    paths = [path for one in sets.values() for path in one.paths]
    place = os.path.commonpath([one.folder for one in sets.values()])
    jobs = jobs if len(paths) > 1 else 1
    with pool_of(jobs) as submit:
        results = in_order(submit, jobs, survey, ((path, labels) for path in paths))
        surveys = _surveyed(results, paths, progress)
        roles, sentences = choose(
            surveys,
            [path.stem for path in paths],
            place=place,
            image_member=image_member,
            class_member=class_member,
            skip_broken=skip_broken,
            alone=len(sets) == 1,
        )
        if roles.of_sequences and dtype != "uint8":
            raise UserError(f"--dtype (={dtype}) is for images; sequences are uint8, so leave it out")
        for sentence in sentences:
            say(f"{place}: {sentence}")
        targets = (one.target for one in sets.values() for _ in one.paths)
        calls = (
            (path, target, roles, one.headers, dtype)
            for path, target, one in zip(paths, targets, surveys, strict=True)
        )
        made = _gather(in_order(submit, jobs, _index_one, calls), sets, place, skip_broken, progress)
    return {split: _complete_set(split, one, made[split], roles, dtype) for split, one in sets.items()}


def _surveyed(results: Iterator[Survey], paths: list[Path], progress: Callable[[int], None]) -> list[Survey]:
    """What the tars hold, with the headers of as many as fit in memory. Raises DataError for a tar without samples."""
    surveys, held = [], 0
    for path, one in zip(paths, results, strict=True):
        if not one.samples:
            raise DataError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)}); remove it")
        held += len(one.headers)
        surveys.append(one if held <= MOST_HEADER_BYTES else one._replace(headers=b""))
        progress(0)  # of the second reading, which takes longer
    return surveys


def _complete_set(split: str, tars: TarSet, made: list[Made], roles: Roles, dtype: Dtype) -> Written:
    names = _report_classes(tars, made, roles)
    origin = {"source": FOREIGN, **noted(roles), **({"split": split} if tars.by_name else {})}
    origin |= {} if dtype == "uint8" else {"dtype": dtype}
    origin |= {"kind": SEQUENCES} if roles.of_sequences else {}
    elsewhere = "" if tars.target == tars.folder else os.path.abspath(tars.folder)
    return complete(tars.target, made, names, origin, tars=elsewhere)


def _gather(
    results: Iterator[Indexed],
    sets: dict[str, TarSet],
    place: str,
    skip_broken: bool,
    progress: Callable[[int], None],
) -> dict[str, list[Made]]:
    """The indexed tars of each set. Raises DataError as soon as it is known whether leaving samples out would help."""
    names = (name for name, one in sets.items() for _ in one.paths)
    made: dict[str, list[Made]] = {name: [] for name in sets}
    unusable: list[Unusable] = []
    doubtful, images = Counter[str](), 0
    for number, (name, one) in enumerate(zip(names, results, strict=True), start=1):
        made[name].append(one.made)
        unusable += one.unusable
        doubtful += one.doubtful
        images += one.made.shard.samples if one.made.shard is not None else 0
        if not images and len(unusable) >= MOST_TRIED:
            break
        if unusable and images and not skip_broken:
            more = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
            remedy = (
                "mend it" if unusable[0].reason == "image" else REMEDIES.get(unusable[0].reason, "mend it")
            )
            raise DataError(
                f"{unusable[0].message}{more}; {remedy}, or leave such samples out with --skip-broken"
            )
        progress(number)
    if not images:
        raise DataError(f"{place}: {_nothing(unusable)}")
    if doubtful:
        reason, count = doubtful.most_common(1)[0]
        remedy = REMEDIES.get(reason, "`vaescale verify-shards DIR --deep` names them")
        if doubtful.total() == images:
            raise DataError(f"{place}: none of {images} images can be used: {reason} ({count}); {remedy}")
        say(
            f"{place}: {doubtful.total()} of {images} images cannot be used: {reason} ({count}); training leaves them "
            f"out, and stops where they are more than data.max_skipped; {remedy}"
        )
    return made


def _nothing(unusable: list[Unusable]) -> str:
    """The sentence for a set of which no sample can be used."""
    reason, count = Counter(fault.reason for fault in unusable).most_common(1)[0]
    example = next(fault.message for fault in unusable if fault.reason == reason)
    return (
        f"none of {len(unusable)} samples can be used, {count} for the same reason: {example}; "
        f"{REMEDIES.get(reason, 'copy the tars again')}"
    )


def _report_classes(tars: TarSet, made: list[Made], roles: Roles) -> tuple[str, ...]:
    """The names of the classes; says which classes have no image, and how many images have no class."""
    shards = [result.shard for result in made if result.shard is not None]
    folder, target = tars.folder, tars.target
    counts = Counter[int]()
    for shard in shards:
        entries = parse_entries((target / shard.entries_name).read_bytes(), shard, str(target))
        counts.update(
            dict(
                zip(
                    *(values.tolist() for values in np.unique(entries["label"], return_counts=True)),
                    strict=True,
                )
            )
        )
    most = max(counts, default=-1)
    names = tuple(roles.words or map(str, range(1 + min(MOST_CLASSES, most))))
    if most >= 0 and counts[-1]:
        say(f"{folder}: {counts[-1]} of {counts.total()} images have no class")
    if most >= len(names):
        say(f"{folder}: class numbers reach {most}; only the first {len(names)} have names in the index")
    if absent := [number for number in range(len(names)) if number not in counts]:
        missing = (
            _ranges(absent) if roles.words is None else ", ".join(names[number] for number in absent[:10])
        )
        say(f"{folder}: {len(absent)} of {len(names)} classes have no image: {missing}")
    return names


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as `0-4, 7`; the first ten of such ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(words[:10]) + (f" and {len(words) - 10} more ranges" if len(words) > 10 else "")


def make_index(
    folder: Path,
    path: Path,
    name: str,
    roles: Roles = USUAL,
    check: Callable[[bytes], Header] = read_header,
    listed: list[Member] | None = None,
    dtype: Dtype = "uint8",
) -> tuple[
    Shard | None,
    list[list[int]],
    list[TarFault],
    Counter[str],
    tuple[float, float] | None,
    dict[str, int],
]:
    """Read a tar strictly and write the entries of shard `name`. Returns its row, its images' shapes, its unusable samples,
    counts of what is remarkable in the headers of its images, the least and the greatest value of types other than uint8, and the
    numbers of sequences by FRAMESxHEIGHTxWIDTHxCHANNELS.

    check: reads an image's header, and raises PictureFault for one that cannot be used. listed: the tar's members, where its
    headers are read already. Raises TarFault when the tar itself is not sound.
    """
    rows: list[tuple[int, int, int, int, str]] = []
    shapes: set[tuple[int, ...]] = set()
    faults: dict[str, TarFault] = {}
    remarks = Counter[str]()
    frames: dict[str, Header] = {}
    low, high = math.inf, -math.inf
    with path.open("rb") as file:
        for sample in samples(file, roles, None if listed is None else groups(file, listed)):
            if isinstance(sample, TarFault):
                faults[sample.key] = sample
                # Samples that share a key are both left out.
                rows = [row for row in rows if row[4] != sample.key]
                continue
            try:
                header = check(sample.content)
                if dtype != "uint8":
                    values = values_of(sample.content, dtype)
                    low, high = min(low, float(values.min())), max(high, float(values.max()))
            except PictureFault as error:
                faults[sample.key] = TarFault(
                    str(error), member=sample.key, offset=sample.offset, key=sample.key, reason=error.reason
                )
                continue
            shapes.add(header.shape)
            if header.frames:
                frames[sample.key] = header
            remarks.update(kept_remarks(sample.content, header))
            rows.append((sample.offset, len(sample.content), sample.crc32, sample.label, sample.key))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        return None, [], list(faults.values()), remarks, None, {}
    sequences = [frames[row[4]] for row in rows] if frames else []
    content = entries_content(make_entries(rows, [one.frames for one in sequences] if frames else None))
    shard = Shard(name, size, sha256, len(rows), len(content), hashlib.sha256(content).hexdigest())
    write_whole(folder / shard.entries_name, content)
    bounds = None if dtype == "uint8" else (low, high)
    numbers = Counter("x".join(map(str, (one.frames, *one.shape))) for one in sequences)
    return shard, sorted(map(list, shapes)), list(faults.values()), remarks, bounds, dict(numbers)


def _index_one(path: Path, target: Path, roles: Roles, headers: bytes, dtype: Dtype) -> Indexed:
    doubtful = Counter[str]()

    def check(content: bytes) -> Header:
        header = header_check(dtype, of_sequences=roles.of_sequences)(content)
        if dtype == "uint8" and _may_be_transparent(content, header.format):
            try:
                decode(content)
            except PictureFault as error:  # reading leaves it out and counts it
                doubtful[error.reason] += 1
        return header

    try:
        listed = unpacked_headers(headers) if headers else None
        shard, shapes, faults, remarks, bounds, sequences = make_index(
            target, path, path.name, roles, check, listed, dtype
        )
    except TarFault as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror}; repeat the command") from error
    unusable = [
        Unusable(fault.reason, f"{path} member {fault.member!r} at byte {fault.offset}: {fault}")
        for fault in faults
    ]
    return Indexed(
        Made(shard, shapes, [fault.message for fault in unusable], dict(remarks), None, bounds, sequences),
        unusable,
        doubtful,
    )


def _may_be_transparent(content: bytes, kind: str) -> bool:
    """Whether an image has an alpha channel or frames, which its values decide about."""
    if kind == "png":
        return content[25] in (4, 6) or any(name in content[:4096] for name in (b"tRNS", b"acTL"))
    return kind == "webp" and content[12:16] in (b"VP8X", b"VP8L")


def complete(
    folder: Path,
    results: list[Made],
    class_names: tuple[str, ...],
    made: dict[str, Any],
    *,
    tars: str = "",
    left_out: Mapping[str, int] | None = None,
) -> Written:
    """Write index.json over shards. made: their origin; tars: their folder. Raises DataError when no image is left.

    left_out: files that are no images, for the table of the index; None for an index without one.
    """
    shards = [result.shard for result in results if result.shard is not None]
    skipped = [message for result in results for message in result.skipped]
    if not shards:
        raise DataError(f"no image to write to {folder}; {_why_none(skipped)}")
    shapes = {tuple(shape) for result in results for shape in result.shapes}
    image = next(iter(shapes)) if len(shapes) == 1 else None
    remarks = Counter[str]()
    for result in results:
        remarks.update(result.remarks)
    told = noteworthy(remarks)
    made = {**made, "skipped": len(skipped), **({"pictures": told} if told else {})}
    if left_out is not None and all(result.counts is not None for result in results):
        counts = Counts()
        for result in results:
            counts.add(result.counts or {})
        made["table"] = counts.table(class_names, left_out)
    if sequences := _counted(result.sequences for result in results):
        _refuse_other_frames(folder, sequences)
        made["lengths"] = {str(number): count for number, count in _by_length(sequences).items()}
    bounds = [result.bounds for result in results if result.bounds is not None]
    values = Values()
    if bounds:
        values = Values(made["dtype"], min(low for low, _ in bounds), max(high for _, high in bounds))
    index = ShardIndex(str(folder), ShardTable.of(shards), image, class_names, made, tars, values)  # type: ignore[arg-type]
    write_whole(folder / INDEX, index_content(index))
    return Written(index, skipped, dict(remarks))


def _counted(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for one in counts:
        total.update(one)
    return total


def _by_length(sequences: Mapping[str, int]) -> dict[int, int]:
    """The numbers of sequences by length, from those by FRAMESxHEIGHTxWIDTHxCHANNELS."""
    lengths = Counter[int]()
    for shape, count in sequences.items():
        lengths[int(shape.partition("x")[0])] += count
    return dict(sorted(lengths.items()))


def _refuse_other_frames(folder: Path, sequences: Mapping[str, int]) -> None:
    """Raise DataError where the frames of some sequences have another size than those of others, or other channels."""
    frames = Counter[str]()
    for shape, count in sequences.items():
        frames[shape.partition("x")[2]] += count
    if len(frames) > 1:
        named = ", ".join(f"{count} of {shape}" for shape, count in frames.most_common(NAMED))
        more = f" and {len(frames) - NAMED} more shapes" if len(frames) > NAMED else ""
        raise DataError(
            f"the sequences for {folder} differ in their frames: {named}{more}; write them from folders of frames with one --size "
            "and --channels (`vaescale make-shards frames:DIR OUT`)"
        )


def _why_none(skipped: list[str]) -> str:
    """Why no image is left, from the sentences `NAME: REASON` of all that were left out."""
    if not skipped:
        return "the source gives none; check its path, or use --holdout 0 where it holds few images"
    reason, count = Counter(message.partition(": ")[2] for message in skipped).most_common(1)[0]
    convert = "" if reason == FLATTEN else "; convert them first"
    return f"{count} of {len(skipped)} images cannot be used for the same reason: {reason}{convert}"
