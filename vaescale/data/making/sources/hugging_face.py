"""`hf:NAME[:SPLIT]`: a data set of the Hugging Face hub, or a local folder in one of its formats."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from vaescale.data.making.items import Item, members_of
from vaescale.data.making.sources.base import Source, Split, split_of
from vaescale.data.making.sources.hub_columns import Columns, Numbering, choose_columns, number_classes
from vaescale.errors import DataError
from vaescale.system.console import say


def hugging_face(name: str, *, config: str | None = None, column: str | None = None) -> Source:
    """A data set of the hub, or a local folder in one of its formats, streamed through `datasets`.

    column: `image=NAME,label=NAME`, or one of them; by default the first image column and the first column of classes, and
    what else there is is said; `vector=NAME` or `vector=NAME+NAME` takes columns of numbers, or of lists of them, as the vector of each image. Numbers and words as classes are numbered in sorted order over all splits. Raises
    DataError when there is no image column, and UserError for a column that does not fit.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    argument = name
    # The last colon separates a split: `hf:ylecun/mnist:train`.
    name, _, wanted = argument.rpartition(":") if ":" in argument else (argument, "", "")

    def load(split: str, **options: Any) -> Any:
        return datasets.load_dataset(name, config, split=split, streaming=True, **options)

    try:
        names = [wanted] if wanted else datasets.get_dataset_split_names(name, config)
        streams = {split: load(split) for split in names}
    except Exception as error:  # the library raises a dozen kinds, network faults among them
        message = " ".join(str(error).split())[:300]
        raise DataError(f"hf:{argument} cannot be opened: {message}{_remedy(name)}") from error

    @cache
    def chosen() -> tuple[Columns, Numbering]:
        features = next(iter(streams.values())).features or {}
        columns = choose_columns(f"hf:{argument}", features, column)
        every = names
        if wanted and columns.label and not columns.has_names:  # the numbers are those of the whole data set
            with suppress(
                Exception
            ):  # the library raises a dozen kinds; a slice of a split has no other ones
                every = list(dict.fromkeys([wanted, *datasets.get_dataset_split_names(name, config)]))
        rows = {split: partial(_label_rows, name, partial(load, split), columns) for split in every}
        return columns, number_classes(f"hf:{name}", rows, columns)

    splits: dict[str, Callable[[], Split]] = {}
    for split, data in streams.items():
        usual = split_of(split) or split
        splits[split if usual in splits else usual] = partial(_hub_split, name, data, chosen)
    return Source(splits, complete=bool(wanted))  # a split that is named is the only one


def _remedy(name: str) -> str:
    """What can be done with a folder of tars that `datasets` does not open."""
    if not any(Path(name).glob("*.tar")) and not any(Path(name).glob("*/*.tar")):
        return ""
    return f"; its tars can be indexed in place with `vaescale make-shards --index-only {name}`"


def _label_rows(name: str, load: Callable[..., Any], columns: Columns) -> Iterator[Any]:
    """The labels of a split. Parquet files are read without their images."""
    column = columns.label.partition(".")[0]
    try:
        data = load(columns=[column])  # only Parquet has this option
        rows = _rows(name, data)
        first = next(rows, None)
    except (DataError, ValueError, TypeError):
        yield from map(columns.label_of, _rows(name, load().select_columns([column])))
        return
    if first is not None:
        yield columns.label_of(first)
        yield from map(columns.label_of, rows)


def _rows(name: str, data: Any) -> Iterator[dict[str, Any]]:
    rows = iter(data)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # network faults, damaged parquet: the library raises a dozen kinds
            raise DataError(
                f"hf:{name}: {' '.join(str(error).split())[:300]}; repeat the command to continue{_remedy(name)}"
            ) from error
        yield row


def _hub_split(name: str, data: Any, chosen: Callable[[], tuple[Columns, Numbering]]) -> Split:
    import datasets
    from datasets.utils.file_utils import xopen

    columns, numbering = chosen()
    data = data.select_columns(columns.names())
    data = data.cast_column(columns.image, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        unlabelled, absent, keys = 0, 0, set[int]()
        number, size = -1, 0
        for number, row in enumerate(_rows(name, data)):
            image = row[columns.image] or {}
            content = image.get("bytes")
            if content is None and image.get("path") and _is_within(image["path"], name):
                with xopen(image["path"], "rb") as file:
                    content = file.read()
            label = numbering.number(columns.label_of(row)) if columns.label else -1
            unlabelled += label < 0
            members: tuple[tuple[str, bytes], ...] = ()
            if columns.vectors:
                vector = columns.vector_of(row, number)
                if vector is None:
                    absent += 1
                else:
                    size = size or len(vector)
                    if len(vector) != size:
                        raise DataError(
                            f"row {number}: the columns {', '.join(columns.vectors)} hold {len(vector)} numbers, and those of rows before "
                            f"{size}; choose others with --column vector=NAME"
                        )
                    members = members_of(vector[None], 0)
            # A missing image counts as a broken one, which can be left out.
            yield Item(_key(row, columns, number, keys), content or b"", label, members)
        if columns.label and unlabelled:
            say(f"hf:{name}: {unlabelled} of {number + 1} images have no class ({columns.label})")
        if absent:
            say(f"hf:{name}: {absent} of {number + 1} images have no vector ({', '.join(columns.vectors)})")

    count = data.info.splits[data.split].num_examples if data.info.splits and data.split else None
    return Split(items(), count, numbering.class_names)


def _key(row: dict[str, Any], columns: Columns, number: int, taken: set[int]) -> str:
    """The key of a row of a WebDataset tar, or its number. A key that several tars have gets the row's number."""
    key = str(row.get(columns.key) or "") if columns.key else ""
    parts = key.split("/")
    if (
        not key
        or not key.isprintable()
        or ".." in parts
        or not parts[-1]
        or "." in parts[-1]
        or key[0] == "/"
    ):
        return f"{number:09d}"
    key = f"{key}~{number:09d}" if hash(key) in taken else key
    taken.add(hash(key))
    return key


def _is_within(path: str, name: str) -> bool:
    """Whether a file that a row names belongs to its data set: a row may name any file of this machine."""
    last = path.rpartition("::")[2]
    if "://" in last:
        return last.startswith(("hf://", "https://huggingface.co/"))
    return Path(last).resolve().is_relative_to(Path(name).resolve())
