"""`lsun:PATH`: LSUN's databases, CATEGORY_train_lmdb and CATEGORY_val_lmdb, each an LMDB of encoded images. Yu et al. 2015."""

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from vaescale.data.making.items import Item
from vaescale.data.making.sources.archives import is_archive
from vaescale.data.making.sources.base import Source, Split, report_absent, split_of
from vaescale.errors import DataError

DATA = "data.mdb"
_NAME = re.compile(r"(?:(.+)_)?(train|val|test)_lmdb", re.IGNORECASE)


class Database(NamedTuple):
    """A folder with an LMDB: its split and its category, empty where its name does not tell one."""

    path: Path
    split: str
    category: str


def lsun(path: Path) -> Source:
    """The images of LSUN in the order of their keys, which is random; those of several categories are mixed.

    path: a database, or a folder of several. Their names tell splits and categories, and several categories are classes. Values
    are encoded images, usually WebP; keys may be any bytes. Raises DataError where there is no sound database.
    """
    databases = _databases(path.parent if path.name == DATA else path)
    names = tuple(sorted({each.category for each in databases} - {""}))
    names = names if len({each.category for each in databases}) > 1 else ()
    splits: dict[str, list[Database]] = {}
    for each in databases:
        if any(each.category == other.category for other in splits.setdefault(each.split, [])):
            both = f"{splits[each.split][0].path} and {each.path}"
            raise DataError(f"{both} are databases of one category and split; give one of them")
        splits[each.split].append(each)
    return Source({split: partial(_split, split, inner, names) for split, inner in splits.items()})


def _databases(path: Path) -> list[Database]:
    folders = [path] if (path / DATA).is_file() else sorted(file.parent for file in path.glob(f"*/{DATA}"))
    if folders:
        return [_named(folder) for folder in folders]
    packed = sorted(file for file in path.iterdir() if is_archive(file)) if path.is_dir() else []
    remedy = (
        f"unpack {packed[0]} first"
        if packed
        else "give the folder that holds church_outdoor_train_lmdb or another one"
    )
    raise DataError(f"{path} holds no {DATA}, nor does a folder in it; {remedy}")


def _named(folder: Path) -> Database:
    match = _NAME.fullmatch(folder.resolve().name)
    if match is None:
        return Database(folder, "train", folder.resolve().name)
    return Database(folder, split_of(match[2]) or "train", match[1] or "")


def _split(split: str, databases: Sequence[Database], names: tuple[str, ...]) -> Split:
    numbers = [_number(each.path) for each in databases]
    report_absent(split, names, {each.category for each in databases})
    labels = {name: label for label, name in enumerate(names)}

    def items() -> Iterator[Item]:
        paced = [_paced(each, number, labels) for each, number in zip(databases, numbers, strict=True)]
        return (item for _, item in heapq.merge(*paced, key=lambda pair: pair[0]))

    return Split(_Again(items), sum(numbers), names)


class _Again:
    """A stream that can be read several times: for what is held out and for the rest."""

    def __init__(self, start: Callable[[], Iterator[Item]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Item]:
        return self._start()


def _paced(database: Database, number: int, labels: dict[str, int]) -> Iterator[tuple[float, Item]]:
    """The items of a database, each with its place in [0, 1], by which those of several are mixed."""
    for place, item in enumerate(_items(database, labels)):
        yield (place + 0.5) / number, item


def _items(database: Database, labels: dict[str, int]) -> Iterator[Item]:
    import lmdb

    label = labels.get(database.category, -1)
    prefix = f"{database.category}/" if labels else ""
    try:
        with _opened(database.path.resolve()).begin() as transaction:
            for key, value in transaction.cursor():
                yield Item(prefix + key_of(key), value, label)
    except lmdb.Error as error:
        raise DataError(f"{database.path} cannot be read ({error}); fetch it again") from error


def key_of(key: bytes) -> str:
    """A key of a sample for any bytes, one for each: bytes other than letters, digits, `_` and `-` become %XX."""
    return quote(key, safe="").replace(".", "%2E").replace("~", "%7E")


def _number(path: Path) -> int:
    """The number of images in a database. Raises DataError where it is cut, since reading behind its end ends the process."""
    import lmdb

    try:
        environment = _opened(path.resolve())
    except lmdb.Error as error:
        raise DataError(f"{path} is no sound LMDB ({error}); fetch it again") from error
    statistics = environment.stat()
    used = (environment.info()["last_pgno"] + 1) * statistics["psize"]
    size = (path / DATA).stat().st_size
    if size < used:
        raise DataError(f"{path / DATA} is cut: it has {size} of {used} bytes; fetch it again")
    if not statistics["entries"]:
        raise DataError(f"{path} holds no images; give the folder of another database")
    return int(statistics["entries"])


@lru_cache  # a process must not open a database twice, and a stream that ends early stays open
def _opened(path: Path) -> Any:
    import lmdb

    return lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=1)
