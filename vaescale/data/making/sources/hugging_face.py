"""`hf:NAME[:SPLIT]`: a data set of the Hugging Face hub, or a local folder in one of its formats."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import SPLIT_NAMES, Source, Split
from vaescale.errors import DataError


def hugging_face(name: str, *, config: str | None = None) -> Source:
    """A data set of the hub, or a local folder in one of its formats, streamed through `datasets`.

    The first image column and the first class column are taken. Raises DataError when there is no image column.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    argument = name
    # The last colon separates a split: `hf:ylecun/mnist:train`.
    name, _, wanted = argument.rpartition(":") if ":" in argument else (argument, "", "")
    try:
        names = [wanted] if wanted else datasets.get_dataset_split_names(name, config)
        streams = {split: datasets.load_dataset(name, config, split=split, streaming=True) for split in names}
    except Exception as error:  # the library raises a dozen kinds, network faults among them
        message = " ".join(str(error).split())[:300]
        raise DataError(f"hf:{argument} cannot be opened: {message}") from error
    splits = {
        SPLIT_NAMES.get(split, split): partial(_hub_split, name, data) for split, data in streams.items()
    }
    return Source(splits, complete=bool(wanted))  # a split that is named is the only one


def _hub_split(name: str, data: Any) -> Split:
    import datasets
    from datasets.utils.file_utils import xopen

    features = data.features or {}
    columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        named = f"; its columns are {', '.join(features)}" if features else ""
        raise DataError(f"hf:{name} has no image column{named}")
    classes = next((k for k, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    data = data.select_columns([columns[0], *([classes] if classes else [])])
    data = data.cast_column(columns[0], datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        rows = enumerate(data)
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network faults, damaged parquet: the library raises a dozen kinds
                raise DataError(
                    f"hf:{name}: {' '.join(str(error).split())[:300]}; repeat the command to continue"
                ) from error
            image, label = row[columns[0]] or {}, row[classes] if classes else -1
            content = image.get("bytes")
            if content is None and image.get("path") and _is_within(image["path"], name):
                with xopen(image["path"], "rb") as file:
                    content = file.read()
            # A missing image counts as a broken one, which can be left out.
            yield Item(f"{number:09d}", content or b"", -1 if label is None else label)

    count = data.info.splits[data.split].num_examples if data.info.splits and data.split else None
    return Split(items(), count, tuple(features[classes].names) if classes else ())


def _is_within(path: str, name: str) -> bool:
    """Whether a file that a row names belongs to its data set: a row may name any file of this machine."""
    last = path.rpartition("::")[2]
    if "://" in last:
        return last.startswith(("hf://", "https://huggingface.co/"))
    return Path(last).resolve().is_relative_to(Path(name).resolve())
