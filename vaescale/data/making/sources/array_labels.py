"""The classes and vectors of the images of an array, from other arrays."""

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.data.making.sources.stored import Array, Stored
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

MOST_LABEL_BYTES = 1 << 30
NO_CLASS = -1  # of images without a label, by convention
Labels = list[int | str | None]
Vectors = NDArray[np.float32]
_SVHN = re.compile(r"(train|test|extra)_32x32")


def number_of_labels(stored: Stored) -> int:
    """How many images an array of labels is for, by its shape: [N], [N, 1], [1, N] or [N, K]."""
    shape = stored.shape
    return shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0] if shape else 0


def read_labels(
    stored: Stored, key: str, number: int, *, column: str = "", chosen: bool = False
) -> Labels | None:
    """The label of each of `number` images: whole numbers or words. column: of an array [N, K], or empty.

    key: what --column calls the array; chosen: whether --column names it. None, with a sentence, for an array that is not chosen and
    holds no single label for each image; [N, K] with one 1 in each row counts as K classes. SVHN's label 10 becomes its digit, 0.
    Raises DataError for another number of labels, UserError for what --column chooses.
    """
    if (
        stored.dtype.kind not in "biufSU"
        or len(stored.shape) not in (1, 2)
        or stored.nbytes > MOST_LABEL_BYTES
    ):
        _report_left_out(stored, "one number or word for each image is read", key if chosen else "")
        return None
    if number_of_labels(stored) != number:
        raise DataError(
            f"{stored.name} holds {number_of_labels(stored)} labels for {number} images; choose another array with "
            "--column label=KEY, or none with --column label="
        )
    values = stored.whole()
    if 1 in values.shape[1:] or (values.ndim == 2 and len(values) == 1):
        values = values.ravel()
    if column:
        values = _column(values.reshape(number, -1), stored.name, f"{key}.{column}")
    elif values.ndim == 2 and values.dtype.kind in "biuf" and _is_one_hot(values):
        say(f"{stored.name}: the column with the 1 is the class of each image")
        values = values.argmax(axis=1)
    elif values.ndim == 2:
        remedy = f"--column label={key}.0 takes the first of its {values.shape[1]} columns"
        _report_left_out(stored, f"it holds several values for each image; {remedy}", key if chosen else "")
        return None
    if values.dtype.kind == "f" and not _are_whole(values):
        if column:
            raise UserError(
                f"--column label={key}.{column}: this column of {stored.name} holds fractions, which are no classes; choose another "
                "one, or none with --column label="
            )
        _report_left_out(stored, "its values are no whole numbers", key if chosen else "")
        return None
    if (
        _SVHN.fullmatch(stored.path.stem)
        and values.dtype.kind in "iu"
        and {*values.tolist()} <= {*range(1, 11)}
    ):
        say(f"{stored.path}: the label 10 of SVHN is the digit 0")
        values = values % 10
    labels = [_label(value) for value in values.tolist()]
    if none := labels.count(None):
        say(f"{stored.name}: {none} labels are NaN or {NO_CLASS}, which is taken for no class")
    return labels


def read_vectors(stored: Stored, key: str, number: int) -> Vectors:
    """The vector of each of `number` images, float32 [number, V], from an array of numbers [number] or [number, V].

    key: what --column calls the array. A row of NaN is no vector. Raises UserError for other arrays, infinite values, and rows
    that are NaN in part.
    """
    chosen = f"--column vector={key}: {stored.name} ({stored.described()})"
    if stored.dtype.kind not in "biuf" or len(stored.shape) not in (1, 2) or not math.prod(stored.shape):
        raise UserError(f"{chosen} must hold numbers [N] or [N, V]; choose another array, or leave it out")
    if stored.shape[0] != number:
        raise UserError(f"{chosen} has {stored.shape[0]} rows for {number} images; choose another array")
    with np.errstate(over="ignore"):
        values = stored.whole().reshape(number, -1).astype(np.float32)
    absent = np.isnan(values).all(1)
    if wrong := int((~np.isfinite(values).all(1) & ~absent).sum()):
        raise UserError(
            f"{chosen} has {wrong} rows with NaN or infinite values; mend them, or make the whole row NaN for an image without a vector"
        )
    if absent.any():
        say(f"{stored.name}: {int(absent.sum())} of {number} images have no vector, as their rows are NaN")
    return values


def _report_left_out(stored: Stored, why: str, chosen: str) -> None:
    """Say why an array gives no classes. Raises UserError if --column chose it, by that name."""
    sentence = f"{stored.name} ({stored.described()}) gives no classes: {why}"
    if chosen:
        none = "" if "--column" in why else "; choose another array, or none with --column label="
        raise UserError(f"--column label={chosen}: {sentence}{none}")
    say(sentence)


def _column(values: Array, name: str, wanted: str) -> Array:
    key, _, column = wanted.rpartition(".")
    if not column.isdecimal() or int(column) >= values.shape[1]:
        last = values.shape[1] - 1
        raise UserError(
            f"--column label={wanted}: {name} has the columns 0 to {last}; choose one, such as label={key}.{last}"
        )
    return values[:, int(column)]


def _are_whole(values: Array) -> bool:
    return bool((np.isnan(values) | (np.isfinite(values) & (values == np.rint(values)))).all())


def _is_one_hot(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all())


def _label(value: Any) -> int | str | None:
    """A label as number or word; None for NaN and for -1."""
    if value == NO_CLASS:
        return None
    if isinstance(value, float):
        return None if value != value else int(value)
    return (
        value.decode(errors="replace")
        if isinstance(value, bytes)
        else value
        if isinstance(value, str)
        else int(value)
    )
