"""Write a data set as WebDataset shards with an index, one folder a split, or index tars that others wrote."""

from pathlib import Path
from typing import Any, Literal

from vaescale.config import parse_bytes
from vaescale.data.config import Crop, Filter
from vaescale.data.index import INDEX, ShardIndex, describe, parse_index
from vaescale.data.making import writing
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.base import Source
from vaescale.data.making.writing import Making, Written, damaged_shards, differing
from vaescale.data.pictures import Encoding
from vaescale.data.storage import Folder
from vaescale.errors import UserError
from vaescale.system.console import Progress, say
from vaescale.system.host import cores

TOLD = 10  # skipped images that are named
MOST_SHARD_BYTES = 10**13


def make_shards(
    source: str,
    out: Path,
    *,
    size: int | None = None,
    crop: Crop | str | None = None,
    resample: Filter | None = None,
    channels: Literal[1, 3] | None = None,
    encoding: Encoding | Literal["keep"] | None = None,
    quality: int = 95,
    skip_broken: bool = False,
    shard_samples: int = 1000,
    shard_bytes: int | str | None = None,
    holdout: float = 0.05,
    config: str | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Write each split of a source to OUT/SPLIT. Returns the description of each split, by name.

    A split that is complete stays as it is; missing or damaged shards are written again. size, crop, resample, channels:
    None takes the source's own. encoding: None is npy with a size or channels, else `keep`. shard_bytes: a number or a
    size such as 100MB. jobs: number of processes, by default the number of cores. Raises UserError for arguments that
    contradict each other or the shards in OUT.
    """
    if size is None and (crop or resample):
        raise UserError("--crop and --resample cut to a size; add --size PIXELS")
    if encoding == "keep" and (size or channels):
        raise UserError("--encoding keep stores files as they are; leave --size and --channels out")
    side, most_bytes = _parse_crop(crop), _parse_shard_bytes(shard_bytes)
    data_set = open_source(source, holdout=holdout, config=config)
    changed = size is not None or channels is not None
    making = Making(
        size=size,
        crop=side or data_set.crop if size else None,
        resample=resample or data_set.resample,
        channels=channels or (data_set.channels if size else None),
        encoding=encoding or ("npy" if changed else "keep"),
        quality=quality,
        shard_samples=shard_samples,
        shard_bytes=most_bytes,
        skip_broken=skip_broken,
    )
    result = {}
    for split in data_set.splits:
        origin: dict[str, Any] = {"source": source, "split": split}
        origin |= {} if config is None else {"config": config}
        origin |= {"holdout": holdout} if data_set.held_out and split in ("train", "val") else {}
        result[split] = _write_split(data_set, split, out / split, making, origin, jobs=jobs or cores())
    return result


def index_shards(folder: Path, *, skip_broken: bool = False, jobs: int | None = None) -> dict[str, Any]:
    """Index the tars of a folder in place. Returns {"index": their description}. Raises UserError when it is no folder."""
    if not folder.is_dir():
        raise UserError(f"--index-only {folder} is not a folder; give the folder of the tars")
    with Progress(f"index {folder}", len(list(folder.glob("*.tar")))) as progress:
        written = writing.index_shards(
            folder,
            skip_broken=skip_broken,
            jobs=jobs or cores(),
            progress=lambda done: progress.update(done, "shards"),
        )
    _tell_skipped(written)
    return {"index": _describe(written.shards)}


def _parse_crop(crop: str | int | None) -> Crop | None:
    if crop is None:
        return None
    if crop in ("square", "whole"):
        return "whole" if crop == "whole" else "square"
    if not str(crop).isdecimal() or int(crop) < 1:
        raise UserError(f"--crop (={crop}) must be square, whole or a number of pixels of at least 1")
    return int(crop)


def _parse_shard_bytes(size: str | int | None) -> int | None:
    try:
        number = None if size is None else int(parse_bytes(size))
    except ValueError as error:
        raise UserError(f"--shard-bytes {size!r}: {error}") from None
    if number is not None and not 1 <= number <= MOST_SHARD_BYTES:
        raise UserError(f"--shard-bytes (={size}) must be from 1 to {MOST_SHARD_BYTES}")
    return number


def _write_split(
    source: Source, split: str, folder: Path, making: Making, origin: dict[str, Any], *, jobs: int
) -> dict[str, Any]:
    """Write one split, or the shards of it that are missing or damaged. origin: what the index says of the source."""
    if (folder / INDEX).is_file():
        index = parse_index(Folder(str(folder)).read_index(INDEX), str(folder))
        _refuse_other_origin(index, {**origin, **making.words()})
        damaged = damaged_shards(index, folder)
        if not damaged:
            say(f"{folder} is there already ({index.num_samples} samples); delete it to write it anew")
            return _describe(index)
        say(
            f"{folder}: {', '.join(damaged[:3])} missing or damaged; {len(damaged)} of {len(index.shards)} written anew"
        )
    listed = source.splits[split]()
    with Progress(f"write {folder}", listed.number or 0) as progress:
        written = writing.write_shards(
            listed.items,
            folder,
            making,
            class_names=listed.class_names,
            jobs=jobs,
            progress=lambda done: progress.update(done, "images"),
            made=origin,
        )
    _tell_skipped(written)
    return _describe(written.shards)


def _describe(index: ShardIndex) -> dict[str, Any]:
    return {**describe(index), "skipped": index.made.get("skipped", 0)}


def _tell_skipped(written: Written) -> None:
    for message in written.skipped[:TOLD]:
        say(f"skipped {message}")
    if len(written.skipped) > TOLD:
        say(f"... and {len(written.skipped) - TOLD} more")


def _refuse_other_origin(index: ShardIndex, origin: dict[str, Any]) -> None:
    before = {name: value for name, value in index.made.items() if name != "skipped"}
    if difference := differing(before, origin):
        raise UserError(
            f"{index.place} holds shards that were made otherwise ({difference}); delete it or choose another OUT"
        )
