"""TIFF files that Pillow does not read or would cut: several channels of more than 8 bits, and more than four of 8 bits.

The package tifffile reads them, where it is installed.
"""

import importlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vaescale.data.pictures.faults import PictureFault
from vaescale.data.pictures.header import MOST_CHANNELS, refuse_size

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter of files with 64-bit offsets

_SAMPLES_PER_PIXEL = 277  # the tag


def is_tiff(content: bytes) -> bool:
    """Whether a file begins as a TIFF."""
    return content.startswith(_MAGIC)


def channels_of(content: bytes) -> int:
    """The number of channels that the first page of a TIFF states; 0 where its header cannot be read."""
    file = io.BytesIO(content)
    try:
        directory = ImageFileDirectory_v2(file.read(16 if content[2:4] in (b"+\0", b"\0+") else 8))
        file.seek(directory.next)
        directory.load(file)
        return int(directory.get(_SAMPLES_PER_PIXEL, 1))
    except Exception:  # Pillow raises many kinds for damaged files
        return 0


def decode_tiff(content: bytes, dtype: str) -> NDArray[Any]:
    """The values [H, W, C] of a TIFF of one page, in their stored type and order of channels. Raises PictureFault.

    dtype: the type that is wanted; others are refused.
    """
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError as error:
        raise PictureFault(
            "depth",
            "it is a TIFF of channels that Pillow does not read or cuts; `pip install tifffile` reads it, or save it as npy",
        ) from error
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            if len(file.pages) != 1:
                raise PictureFault(
                    "format", f"it has {len(file.pages)} pages; save each as a file of its own"
                )
            page = file.pages[0]
            if page.axes not in ("YX", "YXS", "SYX"):
                raise PictureFault("shape", f"its axes are {page.axes}; save it as npy [H, W, C]")
            height, width = (page.shape[page.axes.index(axis)] for axis in "YX")
            channels = page.shape[page.axes.index("S")] if "S" in page.axes else 1
            refuse_size(height, width)
            if channels > MOST_CHANNELS:
                raise PictureFault("shape", f"it has {channels} channels; at most {MOST_CHANNELS} are read")
            if page.dtype != np.dtype(dtype):
                raise PictureFault("depth", f"its values are {page.dtype}, not {dtype}")
            values: NDArray[Any] = page.asarray()
    except (PictureFault, MemoryError):
        raise
    except Exception as error:  # it raises many kinds, of missing codecs too
        raise PictureFault("damaged", f"it does not decode ({error})") from error
    values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
    return np.ascontiguousarray(values.reshape(height, width, channels), dtype)
