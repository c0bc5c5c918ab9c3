"""Codes as WebDataset shards with the same index as images: KEY.codes.npy, int32 [h, w], and, where there is a class, KEY.cls.

index.json's `made` has the number of different codes, `codes`, and the shape of a map, `code_shape`, and names the run and the
images. Where these are joined by their mirror images, the codes of those are KEY_mirrored.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.data.index import CODES, INDEX, Shard, ShardIndex, parse_index
from vaescale.data.latent_shards import write_members
from vaescale.errors import DataError

EXTENSION = "codes.npy"
MIRRORED = "_mirrored"  # the end of a mirror image's key
MOST_CODES, MOST_SIDE = 1 << 24, 1 << 16


@dataclass(frozen=True)
class CodeShards:
    """Codes in a folder, with their index. codes: the number of different ones; shape: (h, w) of a map."""

    index: ShardIndex
    folder: Path
    codes: int
    shape: tuple[int, int]

    @property
    def header(self) -> bytes:
        """The bytes before the values of a member."""
        return code_header(self.shape)


def code_header(shape: tuple[int, int]) -> bytes:
    """The bytes of a .npy file before the values of a map of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<i4", "fortran_order": False, "shape": tuple(shape)}
    )
    return buffer.getvalue()


def write_codes(
    folder: Path, name: str, *, keys: Sequence[str], labels: NDArray[np.int64], codes: NDArray[np.int32]
) -> Shard:
    """Write one shard of codes [n, h, w] and its entries, whole or not at all. Returns its row."""
    begin = code_header((codes.shape[1], codes.shape[2]))
    contents = (begin + values.tobytes() for values in np.ascontiguousarray(codes, dtype="<i4"))
    return write_members(folder, name, keys=keys, labels=labels, contents=contents, ending=EXTENSION)


def open_codes(folder: Path) -> CodeShards:
    """Open the codes in a folder. Raises DataError when it holds none."""
    try:
        index = parse_index((folder / INDEX).read_bytes(), str(folder))
    except OSError:
        raise DataError(f"{folder} holds no codes; write them with `vaescale encode RUN`") from None
    return codes_of_index(index, folder)


def codes_of_index(index: ShardIndex, folder: Path) -> CodeShards:
    """The codes that an index describes. Raises DataError when it describes none."""
    made: dict[str, Any] = index.made
    codes, shape = made.get("codes"), made.get("code_shape")
    sizes = [codes, *shape] if isinstance(shape, list) and len(shape) == 2 else []
    if made.get("kind") != CODES or not all(
        type(size) is int and 0 < size <= most
        for size, most in zip(sizes, (MOST_CODES, MOST_SIDE, MOST_SIDE), strict=False)
    ):
        sizes = []
    if not sizes:
        raise DataError(
            f"{folder} holds no codes; give a folder that `vaescale encode` wrote of a run with codes"
        )
    return CodeShards(index, folder, sizes[0], (sizes[1], sizes[2]))
