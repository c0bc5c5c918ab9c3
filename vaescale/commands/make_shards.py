"""Write a data set as WebDataset shards with an index, one folder for each split, or index existing tars."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vaescale.commands.signature import Jobs, checked
from vaescale.config import Dtype, Size, option_of, parse_bytes, sides, size_of
from vaescale.data.config import MOST_CHANNELS, MOST_FRAMES, Crop, Filter
from vaescale.data.index import INDEX, SEQUENCES, ShardIndex, describe, parse_index
from vaescale.data.making import indexing, writing
from vaescale.data.making.indexing import Written
from vaescale.data.making.remarks import sentences
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.storing import Making
from vaescale.data.making.survey import survey
from vaescale.data.making.table import table_rows
from vaescale.data.making.tar_sets import find_tars
from vaescale.data.making.vector_table import listed_before, read_table, with_vectors
from vaescale.data.making.writing import damaged_shards, differing
from vaescale.data.pictures import Encoding, parse_colour
from vaescale.data.storage import Folder
from vaescale.errors import UserError
from vaescale.system.console import Progress, say
from vaescale.system.host import cores

Side = Annotated[int, Field(ge=1, le=16384)]
REPORTED = 10  # skipped images that are printed by name
MOST_SHARD_BYTES = 10**13
DEFAULT_QUALITY = 95
FOUND = (
    "skipped",
    "pictures",
    "table",
    "lengths",
)  # in `made` of an index, what was found; the rest is what was asked
_OF_TARS = ("index_dir", "image_member", "class_member")
_OF_BOTH = ("skip_broken", "dtype", "jobs")


def refuse_unused(
    options: Mapping[str, Any], *, folder: Path | None, source: str | None, out: Path | None
) -> None:
    """Raise UserError for options that have no effect. folder: of --index-only; options: those that are given, by name."""
    if folder is not None and source is not None:
        raise UserError("--index-only DIR writes no shards; leave SOURCE and OUT out")
    if folder is None and out is None:
        raise UserError("SOURCE and OUT are needed, such as `vaescale make-shards digits data/digits`")
    unused = [name for name in options if (name in _OF_TARS) != bool(folder) and name not in _OF_BOTH]
    if unused:
        name = f"--{min(unused).replace('_', '-')}"
        where = (
            "shards that are written; leave it out of --index-only" if folder else "--index-only DIR; add it"
        )
        raise UserError(f"{name} is for {where}")


@checked
def make_shards(
    source: str,
    out: Path,
    *,
    size: Side | tuple[Side, Side] | None = None,
    crop: Crop | str | None = None,
    resample: Filter | None = None,
    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS)] | None = None,
    dtype: Dtype = "uint8",
    encoding: Literal[Encoding, "keep"] | None = None,
    quality: Annotated[int, Field(ge=1, le=100)] | None = None,
    flatten: str | None = None,
    skip_broken: bool = False,
    shard_samples: Annotated[int, Field(ge=1, le=10**9)] = 1000,
    shard_bytes: int | str | None = None,
    holdout: Annotated[float, Field(ge=0, le=0.9, allow_inf_nan=False)] | None = None,
    limit: Annotated[int, Field(ge=1)] | None = None,
    dry_run: bool = False,
    splits: str | None = None,
    classes_only: bool = False,
    config: str | None = None,
    column: str | None = None,
    frames: Annotated[int, Field(ge=2, le=MOST_FRAMES)] | None = None,
    count: Annotated[int, Field(ge=1, le=10**9)] | None = None,
    deterministic: bool = False,
    window: Annotated[int, Field(ge=2, le=MOST_FRAMES)] | None = None,
    stride: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None = None,
    vectors: Path | None = None,
    jobs: Jobs | None = None,
) -> dict[str, Any]:
    """Write each split of a source to OUT/SPLIT. Returns the description of each split, by name.

    A complete split is kept; missing or damaged shards are written again. size: the side of squares in pixels, or height and width. crop, resample, channels: None takes the
    default of the source. encoding: None is npy with a size or channels, else `keep`. flatten: the colour that transparent
    images are put on, a name or #rrggbb. shard_bytes: a number or a size such as 100MB. holdout: fraction of train that
    becomes val if the source has no val; by default 5% if train is its only split, else 0. limit: number of images of each split, the
    first ones. dry_run: write nothing, and return counts of each split by class, shape and fault. splits: folders of the
    splits of a folder:, as train=DIR,val=DIR; classes_only: all its sub-folders are classes. column: image=NAME,label=NAME
    of an hf: data set; image=KEY[:AXES],label=KEY[.COLUMN],vector=KEY of arrays:; label=NAME of cifar:. vectors: a table, a CSV file or list_attr_celeba.txt, with
    a vector for each image by its name, for the condition of a model (`condition.kind=vector`). dtype: the type of the values, which are kept
    as they are; images of other types are refused. channels: 2 and 4 keep the alpha channel of files. quality: of jpg, by default 95. frames, count,
    deterministic: of a moving-mnist: source, the length of its sequences, by default 20, their number in train, by default 10,000, and whether digits
    are reflected at walls. window, stride: of a frames: source, the frames of the sequences that are cut of each clip, by default whole clips,
    and those between the begins of two. jobs: number of processes, by default the number of cores. Raises UserError for arguments that contradict each other or the shards in OUT.
    """
    if size is None and (crop or resample):
        raise UserError("--crop and --resample need a size; add --size PIXELS")
    if encoding == "keep" and (size or channels):
        raise UserError("--encoding keep stores files as they are; leave --size and --channels out")
    if quality is not None and encoding != "jpg":
        raise UserError(f"--quality (={quality}) is for --encoding jpg; add that or leave it out")
    _refuse_encoding(encoding, dtype, channels)
    size = size if size is None else size_of(*sides(size))
    chosen, most_bytes = parse_crop(crop), _parse_shard_bytes(shard_bytes)
    refuse_squares(size, chosen)
    data_set = open_source(
        source,
        holdout=holdout,
        config=config,
        column=column,
        splits=splits,
        classes_only=classes_only,
        dtype=dtype,
        size=size,
        frames=frames,
        count=count,
        deterministic=deterministic,
        window=window,
        stride=stride,
    )
    if data_set.holds == "sequences":
        _refuse_for_sequences(encoding, dtype, vectors)
    table = None if vectors is None else read_table(vectors)
    if table is not None:
        data_set = with_vectors(data_set, table)
    _refuse_file(out)
    _refuse_out_within(source, out)
    changed = size is not None or channels is not None or data_set.holds == "sequences"
    making = Making(
        size=size,
        crop=chosen or usual_crop(data_set.crop, size) if size else None,
        resample=resample or data_set.resample,
        channels=channels or (data_set.channels if size else None),
        encoding=encoding or ("npy" if changed else "keep"),
        quality=quality or DEFAULT_QUALITY,
        shard_samples=shard_samples,
        shard_bytes=most_bytes,
        skip_broken=skip_broken,
        flatten=_parse_colour(flatten),
        dtype=dtype,
    )
    result: dict[str, Any] = {}
    if dry_run:
        result = {split: _survey(data_set, split, making, limit) for split in data_set.splits}
        if data_set.holds == "sequences":
            result = {split: {**found, "holds": "sequences"} for split, found in result.items()}
        _report_held_out(data_set, {split: found["images"] for split, found in result.items()}, limit)
        return result
    if table is not None:
        data_set = listed_before(data_set)
    for split in data_set.splits:
        origin: dict[str, Any] = {"source": source, "split": split}
        given: dict[str, Any] = {"config": config, "column": column, "limit": limit, "splits": splits}
        given |= {"frames": frames, "count": count, "window": window, "stride": stride}
        origin |= {name: value for name, value in given.items() if value is not None}
        origin |= {"classes_only": True} if classes_only else {}
        origin |= {"kind": SEQUENCES} if data_set.holds == "sequences" else {}
        origin |= {"deterministic": True} if deterministic else {}
        origin |= {} if table is None else {"vectors": table.origin}
        origin |= {"holdout": data_set.held_out} if data_set.held_out and split in ("train", "val") else {}
        result[split] = _write_split(
            data_set, split, out / split, making, origin, limit=limit, jobs=jobs or cores()
        )
    _report_held_out(data_set, {split: found["samples"] for split, found in result.items()}, limit)
    return result


@checked
def index_shards(
    folder: Path,
    *,
    index_dir: Path | None = None,
    image_member: str | None = None,
    class_member: str | None = None,
    skip_broken: bool = False,
    dtype: Dtype = "uint8",
    jobs: Jobs | None = None,
) -> dict[str, Any]:
    """Write only an index of the tars in a folder, or one for each split.

    index_dir: the folder of the index, by default the one of the tars. image_member: extensions of the images, such as
    input.jpg, separated by commas; dtype: the type of their values; class_member: cls, another extension, json:FIELD, folder or none. None lets the
    tars decide. Returns {"index": their description}, or one for each split. Raises UserError for no folder.
    """
    if not folder.is_dir():
        raise UserError(f"--index-only {folder} is not a folder; give the folder of the tars")
    sets = find_tars(folder, index_dir)
    with Progress(f"index {folder}", sum(len(one.paths) for one in sets.values()), unit="shards") as progress:
        written = indexing.index_tars(
            sets,
            image_member=image_member,
            class_member=class_member,
            skip_broken=skip_broken,
            dtype=dtype,
            jobs=jobs or cores(),
            progress=lambda done: progress.update(done),
        )
    for one in written.values():
        _report_skipped(one)
        for message in sentences(one.remarks, rewritable=False):
            say(f"{one.shards.tars or one.shards.place}: {message}")
    return {split: _describe(one.shards) for split, one in written.items()}


def _refuse_encoding(encoding: str | None, dtype: Dtype, channels: int | None) -> None:
    """Raise UserError for an encoding that does not hold the values."""
    if dtype != "uint8" and encoding not in (None, "npy", "keep", *(["png"] if dtype == "uint16" else [])):
        raise UserError(f"--encoding {encoding} does not hold {dtype}; take npy, or leave it out")
    if channels not in (None, 1, 3) and encoding not in (None, "npy"):
        raise UserError(f"--encoding {encoding} does not hold {channels} channels; take npy, or leave it out")


def _refuse_for_sequences(encoding: str | None, dtype: Dtype, vectors: Path | None) -> None:
    """Raise UserError for images' options that have no effect on sequences."""
    if encoding not in (None, "npy"):
        raise UserError(
            f"--encoding (={encoding}) is for images; sequences are stored as npy, so leave it out"
        )
    if dtype != "uint8":
        raise UserError(f"--dtype (={dtype}) is for images; sequences are uint8, so leave it out")
    if vectors is not None:
        raise UserError(f"--vectors (={vectors}) is for images, which have conditions; leave it out")


def refuse_squares(size: Size | None, crop: Crop | None) -> None:
    """Raise UserError for a crop that would change the aspect of images that are no squares."""
    if size is not None and not isinstance(size, int) and crop not in (None, "aspect", "whole"):
        raise UserError(
            f"--crop (={crop}) gives squares, the images are {option_of(size)}; take --crop aspect or whole"
        )


def usual_crop(crop: Crop, size: Size) -> Crop:
    """A source's crop, which for other sizes than squares is the largest part with their aspect."""
    return crop if isinstance(size, int) or crop == "whole" else "aspect"


def parse_crop(crop: str | int | None) -> Crop | None:
    """The part of an image that --crop names. Raises UserError."""
    if crop is None:
        return None
    if crop in ("square", "aspect", "whole"):
        named: Crop = crop  # type: ignore[assignment]
        return named
    if not str(crop).isdecimal() or int(crop) < 1:
        raise UserError(f"--crop (={crop}) must be square, aspect, whole or a number of pixels of at least 1")
    return int(crop)


def _parse_colour(colour: str | None) -> str | None:
    try:
        return None if colour is None else "#{:02x}{:02x}{:02x}".format(*parse_colour(colour))
    except ValueError:
        raise UserError(
            f"--flatten (={colour}) must be the name of a colour, such as white, or #rrggbb"
        ) from None


def _parse_shard_bytes(size: str | int | None) -> int | None:
    try:
        number = None if size is None else int(parse_bytes(size))
    except ValueError as error:
        raise UserError(f"--shard-bytes {size!r}: {error}") from None
    if number is not None and not 1 <= number <= MOST_SHARD_BYTES:
        raise UserError(f"--shard-bytes (={size}) must be from 1 to {MOST_SHARD_BYTES}")
    return number


def _survey(source: Source, split: str, making: Making, limit: int | None) -> dict[str, Any]:
    listed = source.splits[split]()
    with Progress(f"look at {split}", _number(listed, limit), unit=source.holds) as progress:
        return survey(listed, making, limit=limit, progress=lambda done: progress.update(done))


def _number(listed: Split, limit: int | None) -> int:
    """The number of images that are taken of a split, 0 if it is not known."""
    return 0 if listed.number is None else min(filter(None, (listed.number, limit)), default=0)


def _report_held_out(source: Source, numbers: Mapping[str, int], limit: int | None) -> None:
    """Say how many images were held out of train, or that none were where one might expect it. numbers: of images, by split."""
    if source.held_out:
        # The first images of both splits do not tell their sizes.
        share = f"{numbers['val']} of the {numbers['train'] + numbers['val']} {source.holds} of train"
        share = (
            share
            if limit is None
            else f"{numbers['val']} {source.holds}, of about {100 * source.held_out:.3g}% of all of train; --limit takes at most {limit} of each split"
        )
        say(f"val: {share}, chosen by their names (--holdout)")
    elif "val" not in source.splits and {"train", "test"} <= source.splits.keys():
        say("no val: nothing is held out of train where there is a test; --holdout 0.05 holds 5% out")


def _write_split(
    source: Source,
    split: str,
    folder: Path,
    making: Making,
    origin: dict[str, Any],
    *,
    limit: int | None,
    jobs: int,
) -> dict[str, Any]:
    """Write one split, or its missing or damaged shards. origin: the description of the source for the index."""
    if (folder / INDEX).is_file():
        index = parse_index(Folder(str(folder)).read_index(INDEX), str(folder))
        _refuse_other_origin(index, {**origin, **making.words()})
        damaged = damaged_shards(index, folder)
        _refuse_changed_source(source, split, folder, index, origin, limit=limit, damaged=bool(damaged))
        if not damaged:
            say(f"{folder} already exists ({index.num_samples} samples); delete it to write it again")
            return _describe(index)
        say(
            f"{folder}: {', '.join(damaged[:3])} missing or damaged; writing {len(damaged)} of {len(index.shards)} shards again"
        )
    listed = source.splits[split]()
    with Progress(f"write {folder}", _number(listed, limit), unit=source.holds) as progress:
        written = writing.write_shards(
            islice(listed.items, limit),
            folder,
            making,
            class_names=listed.class_names,
            jobs=jobs,
            progress=lambda done: progress.update(done),
            made=origin,
            left_out=listed.left_out,
        )
    _report_skipped(written)
    advise = (
        making.channels is None and making.encoding != "webp" and making.dtype == "uint8"
    )  # WebP stores grey as RGB
    for message in sentences(written.remarks, advise=advise):
        say(f"{folder}: {message}")
    return _describe(written.shards)


def _refuse_file(out: Path) -> None:
    """Raise UserError where OUT or a folder above it is a file."""
    files = [each for each in (out, *out.parents) if each.exists() and not each.is_dir()]
    if files:
        raise UserError(f"OUT (={out}) must be a folder, and {files[0]} is a file; choose another OUT")


def _refuse_out_within(source: str, out: Path) -> None:
    """Raise UserError when the shards of a folder of images would be written into it, where they would be read as images later."""
    kind, _, rest = source.partition(":")
    place = Path(rest).expanduser()
    if kind in ("folder", "frames") and place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise UserError(f"OUT (={out}) is within the images of {place}; choose a folder outside of it")


def _refuse_changed_source(
    source: Source,
    split: str,
    folder: Path,
    index: ShardIndex,
    origin: Mapping[str, Any],
    *,
    limit: int | None,
    damaged: bool,
) -> None:
    """Refuse, or say, that a source is not what it was when the shards of a folder were written.

    Raises UserError for a folder of images whose number is another, and for damaged shards of a file that was changed since; a file
    that was only touched would give the same shards, so that a whole set is kept and the change is said.
    """
    kind, _, rest = str(origin["source"]).partition(":")
    place = Path(rest).expanduser()
    if kind in ("folder", "frames") and place.is_dir():
        number, before = source.splits[split]().number, index.num_samples + index.made.get("skipped", 0)
        number = number if number is None or limit is None else min(number, limit)
        if number is not None and number != before:
            raise UserError(
                f"{folder} holds the shards of {before} images, and the source has {number} now; delete it or choose another OUT"
            )
    if rest and place.is_file() and place.stat().st_mtime > (folder / INDEX).stat().st_mtime:
        changed = f"{place} was changed after the shards in {folder} were written"
        if damaged:
            raise UserError(f"{changed}, and some of them are missing; delete it or choose another OUT")
        say(f"{changed}; delete {folder} to write it again")


def _describe(index: ShardIndex) -> dict[str, Any]:
    table, skipped = index.made.get("table"), index.made.get("skipped", 0)
    rows = table_rows(table) if table else {"cannot be used": f"{skipped} images"} if skipped else {}
    return {**describe(index), "skipped": skipped, "rows": rows}


def _report_skipped(written: Written) -> None:
    for message in written.skipped[:REPORTED]:
        say(f"skipped {message}")
    if len(written.skipped) > REPORTED:
        say(f"... and {len(written.skipped) - REPORTED} more")


def _refuse_other_origin(index: ShardIndex, origin: dict[str, Any]) -> None:
    before = {name: value for name, value in index.made.items() if name not in FOUND}
    if difference := differing(before, origin):
        raise UserError(
            f"{index.place} holds shards that were made otherwise ({difference}); delete it or choose another OUT"
        )
