"""The bytes of one sample's latents: npy, or safetensors for bf16, which npy does not have.

A member is a header, the same for every sample of a set, and the values in little endian. float32 is exact. fp16 and bf16 round to
nearest, by at most 2^-11 and 2^-8 of a value; fp16 ends at 65,504.
"""

import io
import json
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale.errors import DataError

LatentDtype = Literal["float32", "fp16", "bf16"]
LATENT_DTYPES: tuple[LatentDtype, ...] = get_args(LatentDtype)
VALUE_BYTES = {"float32": 4, "fp16": 2, "bf16": 2}
_NPY = {"float32": "<f4", "fp16": "<f2"}


def extension(*, draws: bool, dtype: LatentDtype) -> str:
    """The extension of a member: moments.npy or draws.npy, with .safetensors for bf16."""
    return f"{'draws' if draws else 'moments'}.{'safetensors' if dtype == 'bf16' else 'npy'}"


def header(shape: tuple[int, ...], *, draws: bool, dtype: LatentDtype) -> bytes:
    """The bytes before the values of an array of this shape."""
    if dtype == "bf16":
        name, size = "draws" if draws else "moments", VALUE_BYTES[dtype] * int(np.prod(shape))
        tensor = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}
        text = json.dumps({name: tensor}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
    buffer = io.BytesIO()
    described = {"descr": _NPY[dtype], "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def to_stored(values: NDArray[np.float32], dtype: LatentDtype) -> NDArray[np.uint8]:
    """The bytes of each row of values [n, ...], uint8 [n, bytes]. Raises DataError when fp16 cannot hold a value."""
    rows = np.ascontiguousarray(values, dtype="<f4").reshape(len(values), -1)
    if dtype == "bf16":
        stored = torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False)
    elif dtype == "fp16":
        with np.errstate(over="ignore"):
            stored = rows.astype("<f2")
        if not np.isfinite(stored).all():
            largest = float(np.abs(rows).max())
            raise DataError(f"fp16 ends at 65504 and a latent is {largest:.6g}; use --dtype bf16")
    else:
        stored = rows
    return stored.view(np.uint8)


def from_stored(rows: NDArray[np.uint8], dtype: LatentDtype) -> NDArray[np.float32]:
    """The values float32 [n, values] of rows of bytes uint8 [n, bytes]."""
    content = np.ascontiguousarray(rows)
    if dtype == "bf16":
        return (content.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return content.view(_NPY[dtype]).astype(np.float32, copy=False)
