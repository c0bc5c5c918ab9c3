"""The vectors that a user gives to a run whose condition they are: numbers, a NumPy file or an array; without them, those of held-out images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaescale.aggregate.vector_choice import VectorChoice
from vaescale.conditions.config import VectorCondition
from vaescale.data.lookup import evenly
from vaescale.errors import UserError
from vaescale.trained import Trained, open_split

MOST_HELD_OUT = 10_000
SHOWN = 4  # values of a vector in a title


def vector_choice(trained: Trained, given: Any) -> VectorChoice:
    """The vectors of samples, from what a user gave; None: those of the held-out images. Raises UserError and DataError."""
    condition = trained.model.condition
    assert isinstance(condition, VectorCondition)
    if given is not None:
        rows = as_vectors(given, condition)
        return VectorChoice(rows, _words(rows))
    reader = open_split(trained.recipe, "val")
    rows = reader.vectors_at(np.asarray(evenly(len(reader), MOST_HELD_OUT)))
    known = rows[~rows.isnan().any(1)]
    if not len(known):
        raise UserError(f"no image of {reader.index.place} has a vector; give --vector")
    return VectorChoice(known, "vectors of the held-out images")


def as_vectors(given: Any, condition: VectorCondition) -> Tensor:
    """Vectors float32 [M, V]: from `none`, numbers such as `1,0,0.5` with `;` between vectors, a .npy file, or an array [V] or [M, V].

    A row of NaN is none, where vectors were hidden in training. Raises UserError for other sizes, and for NaN and infinite values.
    """
    array = _array(given, condition.size)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != condition.size or not len(array):
        raise UserError(
            f"vectors have the shape {list(array.shape)}, and the run takes {condition.size} values each; give [{condition.size}] or "
            f"[N, {condition.size}]"
        )
    rows = torch.from_numpy(np.array(array, dtype=np.float32))
    none = rows.isnan().all(1)
    if not bool(torch.isfinite(rows[~none]).all()):
        raise UserError("vectors hold NaN or infinite values; give finite ones")
    if bool(none.any()) and not condition.dropout:
        raise UserError(
            "none needs a run whose vectors were hidden at times, and condition.dropout is 0; give a vector"
        )
    return rows


def _array(given: Any, size: int) -> Any:
    if given is None or (isinstance(given, str) and given == "none"):
        return np.full(size, np.nan)
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".npy")):
        try:
            return np.asarray(np.load(given, allow_pickle=False), dtype=np.float64)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{given} is no NumPy file of numbers ({str(error).splitlines()[0]}); save an array [N, {size}] with np.save"
            ) from error
    try:
        if isinstance(given, str):
            return np.array([[float(word) for word in row.split(",")] for row in given.split(";")])
        return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"vectors (={given!r:.80}) must be numbers such as 1,0,0.5, an array [N, {size}], a .npy file of one, or none"
        ) from error


def _words(rows: Tensor) -> str:
    if len(rows) > 1:
        return f"{len(rows)} vectors in turn"
    if bool(rows.isnan().all()):
        return "no vector"
    values = ", ".join(f"{value:g}" for value in rows[0, :SHOWN].tolist())
    return f"vector ({values}{', ...' if rows.shape[1] > SHOWN else ''})"
