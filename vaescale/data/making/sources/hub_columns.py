"""The columns of a hub data set: which one is the image, which one the class, and the numbers of the classes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.sources.base import report_absent
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

LABELS = ("label", "labels", "cls", "class", "class_name", "category", "target", "fine_label", "y")
ABSENT = (None, -1, "")  # values that say that an image has no class
MOST_CLASSES = 100_000
FIELDS = ("label", "cls", "class")  # of a WebDataset's json
NAMED = 8


class Columns(NamedTuple):
    """The columns that are read. label: empty for none, `COLUMN.FIELD` of a JSON object; has_names: it has names itself.

    key: the column of WebDataset keys, or empty. vectors: columns of numbers, or of lists of them, that are joined.
    """

    image: str
    label: str = ""
    key: str = ""
    has_names: bool = False
    class_names: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The columns to read."""
        every = (self.image, self.label.partition(".")[0], self.key, *self.vectors)
        return [name for name in dict.fromkeys(every) if name]

    def label_of(self, row: dict[str, Any]) -> Any:
        """The value of the class of a row, None where it has none."""
        column, _, field = self.label.partition(".")
        value = (row[column] or {}).get(field) if field else row[column]
        if isinstance(value, float) and (
            math.isnan(value) or value.is_integer()
        ):  # whole numbers with gaps, from pandas
            return None if math.isnan(value) else int(value)
        return value

    def vector_of(self, row: dict[str, Any], number: int) -> NDArray[np.float32] | None:
        """The vector of row `number`, float32 [V]; None where no column has a value. Raises DataError where some have none, and for
        values that are no numbers.
        """
        values = [row[name] for name in self.vectors]
        try:
            with np.errstate(over="ignore"):
                parts = [np.asarray(math.nan if value is None else value, np.float64) for value in values]
                vector = np.hstack(parts).ravel().astype(np.float32)
        except (TypeError, ValueError):
            vector = np.full(1, np.inf, np.float32)
        names, shown = ", ".join(self.vectors), str(values)[:60]
        if np.isinf(vector).any():
            raise DataError(
                f"row {number}: the columns {names} hold {shown}, which are not finite numbers; choose others with --column vector=NAME"
            )
        if np.isnan(vector).all():
            return None
        if np.isnan(vector).any() or not all(part.size for part in parts):
            raise DataError(
                f"row {number}: some of the columns {names} have no value ({shown}); give all of them or none, or choose others with "
                "--column vector=NAME"
            )
        return vector


class Numbering(NamedTuple):
    """The number of each class. numbers: by the value of the column, None where the values are numbers already."""

    class_names: tuple[str, ...]
    numbers: dict[Any, int] | None

    def number(self, value: Any) -> int:
        """The number of a class, -1 for none. Raises DataError for one that is not known."""
        if value in ABSENT:
            return -1
        if self.numbers is None:
            return int(value)
        if value not in self.numbers:
            raise DataError(
                f"class {str(value)[:40]!r} was not there at the first reading; repeat the command"
            )
        return self.numbers[value]


def choose_columns(source: str, features: dict[str, Any], wanted: str | None) -> Columns:
    """The columns that are taken of `features`; says which are left out. wanted: `image=NAME,label=NAME,vector=NAME+NAME`.

    Raises UserError for a column that does not fit, and DataError where there is no image.
    """
    given = parse_columns(wanted, ("image", "label", "vector"))
    image = _image(source, features, given.get("image"))
    label = _label(source, features, given.get("label"), image)
    names = tuple(getattr(_kind(features, label), "names", ())) if label else ()
    key = "__key__" if "__key__" in features else ""
    vectors = tuple(filter(None, given.get("vector", "").split("+")))
    for name in vectors:
        if name not in features:
            raise UserError(
                f"--column vector={name}: {source} has no such column; its columns are {', '.join(features)}"
            )
    taken_names = (image, label.partition(".")[0], "__key__", "__url__", *vectors)
    rest = [name for name in features if name not in taken_names]
    if rest:
        more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
        taken = f"image={image}" + (f",label={label}" if label else "")
        taken += f",vector={'+'.join(vectors)}" if vectors else ""
        say(
            f"{source}: columns taken: {taken}; left out: {', '.join(rest[:NAMED])}{more} (choose with --column "
            f"image=NAME,label=NAME,vector=NAME)"
        )
    return Columns(image, label, key, bool(names), names, vectors)


def number_classes(
    source: str, labels: Mapping[str, Callable[[], Iterator[Any]]], columns: Columns
) -> Numbering:
    """Number the values of the class column in sorted order, over all splits. labels: those of each split.

    A column that names its classes keeps their numbers. Raises DataError for values that are no classes.
    """
    if not columns.label or columns.has_names:
        return Numbering(columns.class_names, None)
    counts = Counter[Any]()
    seen: dict[str, set[Any]] = {}
    for split, values in labels.items():
        seen[split] = set()
        for value in values():
            if value in ABSENT:
                continue
            if not isinstance(value, int | str):
                raise DataError(
                    f"{source}: column {columns.label} holds {type(value).__name__}, not numbers or words; choose another "
                    f"one with --column label=NAME"
                )
            counts[value] += 1
            seen[split].add(value)
            if len(counts) > MOST_CLASSES:
                raise DataError(
                    f"{source}: column {columns.label} holds more than {MOST_CLASSES} different values; choose another "
                    f"one with --column label=NAME, or none with --column label="
                )
    order = sorted(counts, key=lambda value: (isinstance(value, str), value))
    names = tuple(map(str, order))
    if order and order != list(range(len(order))):
        more = f" ... {names[-1]}" if len(names) > NAMED else ""
        say(
            f"{source}: {len(names)} classes of {columns.label}, in sorted order: {', '.join(names[:NAMED])}{more}"
        )
    for split, there in seen.items():
        if there:
            report_absent(f"{source}: {split}", names, {*map(str, there)})
    return Numbering(names, {value: number for number, value in enumerate(order)})


def parse_columns(wanted: str | None, roles: Sequence[str] = ("image", "label")) -> dict[str, str]:
    """`image=NAME,label=NAME`, as --column gives it, as a dict. roles: what may be named. Raises UserError."""
    pairs = [part.partition("=") for part in wanted.split(",")] if wanted is not None else []
    if any(not equals or name.strip() not in roles for name, equals, _ in pairs):
        every = ",".join(f"{role}=NAME" for role in roles)
        raise UserError(f"--column {wanted} must be {every}, or one of them")
    columns = {name.strip(): value.strip() for name, _, value in pairs}
    if len(columns) < len(pairs):
        raise UserError(f"--column {wanted} names one of them twice; leave one out")
    return columns


def _image(source: str, features: dict[str, Any], wanted: str | None) -> str:
    import datasets

    listed = f"; its columns are {', '.join(features)}" if features else ""
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"--column image={wanted}: {source} has no such column{listed}")
        if not isinstance(features[wanted], datasets.Image) and not _holds_files(features[wanted]):
            raise UserError(f"--column image={wanted} holds no images{listed}")
        return wanted
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    files = [name for name, feature in features.items() if _holds_files(feature)]
    if images:
        return images[0]
    if len(files) == 1:
        return files[0]
    choose = "; choose one with --column image=NAME" if files else ""
    raise DataError(f"{source} has no image column{listed}{choose}")


def _holds_files(feature: Any) -> bool:
    """Whether a column holds the bytes of files, as tables do that were not written by `datasets`."""
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_files(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _kind(features: dict[str, Any], label: str) -> Any:
    """The feature of a column, or of a field of one."""
    column, _, field = label.partition(".")
    feature = features.get(column)
    return feature.get(field) if field and isinstance(feature, dict) else None if field else feature


def _fits(feature: Any) -> bool:
    """Whether a column may hold classes: named ones, whole numbers or words."""
    import datasets

    dtype = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value)
        and (dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint", "float")))
    )


def _label(source: str, features: dict[str, Any], wanted: str | None, image: str) -> str:
    import datasets

    if wanted is not None:
        if wanted and not _fits(_kind(features, wanted)):
            what = (
                "holds no whole numbers or words" if _kind(features, wanted) is not None else "is no column"
            )
            raise UserError(
                f"--column label={wanted} {what} of {source}; its columns are {', '.join(features)}"
            )
        return wanted
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in LABELS if _fits(features.get(name))]
    fields = [f"json.{field}" for field in FIELDS if _fits(_kind(features, f"json.{field}"))]
    return next((name for name in [*named, *usual, *fields] if name != image), "")
