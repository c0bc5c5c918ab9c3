"""The tars to index in place: those of a folder, of each split below it, or of each split by their names."""

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vaescale.data.index import INDEX, parse_index
from vaescale.data.making.sources.base import split_of
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

FOREIGN = "tars made by others"  # `made.source` of their index
ALONE = "index"


class TarSet(NamedTuple):
    """Tars that get one index. target: the folder of the index; by_name: other splits have tars in the same folder."""

    folder: Path
    paths: list[Path]
    target: Path
    by_name: bool = False


def find_tars(folder: Path, index_dir: Path | None = None) -> dict[str, TarSet]:
    """The sets of tars in `folder` by split, or one named `index`.

    index_dir: the folder of the index, or of a folder with an index for each split; by default beside the tars. Raises
    DataError where there are none, and UserError where an index is there already or cannot be written.
    """
    paths = _tars(folder)
    if not paths:
        inner = {
            split: path for path in sorted(folder.iterdir()) if (split := split_of(path.name)) and _tars(path)
        }
        if not inner:
            raise DataError(_without_tars(folder))
        sets = {
            split: TarSet(path, _tars(path), path if index_dir is None else index_dir / split)
            for split, path in inner.items()
        }
    else:
        sets = _by_name(folder, paths, index_dir)
    for one in sets.values():
        _refuse_target(one.target)
        _report_others(one)
    return sets


def split_of_tar(name: str) -> str:
    """The split in a tar's name, such as train in imagenet-train-0001.tar; empty if the name has none or several."""
    splits = {split_of(part) for part in re.split(r"[-_. ]", name)} - {None}
    return splits.pop() or "" if len(splits) == 1 else ""


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _by_name(folder: Path, paths: list[Path], index_dir: Path | None) -> dict[str, TarSet]:
    """One set, or one for each split where the names of the tars tell several."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(split_of_tar(path.name), []).append(path)
    if len(splits.keys() - {""}) < 2:
        return {ALONE: TarSet(folder, paths, index_dir or folder)}
    counts = ", ".join(f"{len(inner)} {split or 'of no split'}" for split, inner in splits.items())
    if "" in splits:
        raise DataError(
            f"{folder} holds tars of several splits by their names ({counts}, such as {splits[''][0].name}); move those of "
            f"each split to a folder of their own"
        )
    if index_dir is None:
        raise DataError(
            f"{folder} holds tars of several splits by their names ({counts}); add --index-dir DIR, which gets an index "
            f"for each split, or move the tars of each split to a folder of their own"
        )
    return {split: TarSet(folder, inner, index_dir / split, by_name=True) for split, inner in splits.items()}


def _without_tars(folder: Path) -> str:
    near = [
        path.name
        for path in [*folder.glob("*.tar.*"), *folder.glob("*.tgz")]
        if not path.name.endswith(".npy")
    ]
    inner = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
    why = f"; unpack {near[0]} first" if near else f"; did you mean {inner[0]}?" if inner else ""
    return f"{folder} holds no .tar files{why or '; give the folder of the shards'}"


def _refuse_target(target: Path) -> None:
    """Create the folder of an index. Raises UserError for an index of other shards, DataError for a read-only folder."""
    with suppress(DataError, OSError):
        before = parse_index((target / INDEX).read_bytes(), str(target)).made.get("source")
        if before != FOREIGN:
            remedy = f"delete {target / INDEX} to index it again, without the classes' names"
            raise UserError(f"{target} has an index already (of {before}); {remedy}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        writable = os.access(target, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise DataError(f"{target} cannot be written; keep the index in another folder with --index-dir DIR")


def _report_others(tars: TarSet) -> None:
    """Say what else is in the folder, which may be forgotten or compressed tars."""
    others = Counter(
        f"folder {path.name}" if path.is_dir() else path.suffix if path.stem else path.name
        for path in tars.folder.iterdir()
        if path.suffix != ".tar"
        and path.name[0] != "."
        and path.name != INDEX
        and not path.name.endswith(".index.npy")
        and path != tars.target
    )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        say(f"not tars in {tars.folder}, left out: {kinds}")
