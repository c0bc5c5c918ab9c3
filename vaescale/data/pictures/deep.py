"""Images of other types than uint8: 16-bit integers and float32, in npy and, of one channel, in PNG and TIFF.

Their values are numbers, not colours: nothing is converted, and what a decoder would cut or scale is a fault with a name.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vaescale.config import Dtype
from vaescale.data.pictures.faults import PictureFault
from vaescale.data.pictures.foreign import open_foreign
from vaescale.data.pictures.header import is_known, npy_layout, read_header, refuse_size
from vaescale.data.pictures.tiff import channels_of, decode_tiff, is_tiff

Values = NDArray[np.uint8 | np.uint16 | np.int16 | np.float32]
_BITS, _FORMAT = 258, 339  # tags of TIFF: bits of a value, and its kind
_SIGNED = 2


def decode_deep(content: bytes, dtype: Dtype) -> Values:
    """The values [H, W, C] of a file that shards hold, whose values have this type. Raises PictureFault."""
    try:
        header = read_header(content, dtype)
        if header.format == "npy":
            _, shape, start = npy_layout(content)
            return np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), offset=start).reshape(shape)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            return np.asarray(picture, np.uint16)[:, :, None]
    except (PictureFault, MemoryError):
        raise
    except Exception as error:  # as in `decoder.py`
        raise PictureFault("damaged", f"it does not decode ({error})") from error


def decode_deep_source(content: bytes, dtype: Dtype) -> Values:
    """The values [H, W, C] of a file of a source, also of a TIFF. Raises PictureFault."""
    if is_known(content):
        return decode_deep(content, dtype)
    if is_tiff(content) and channels_of(content) > 1:
        return decode_tiff(content, dtype)
    try:
        with open_foreign(content) as picture:
            refuse_size(picture.height, picture.width)
            pages = getattr(picture, "n_frames", 1)
            if pages > 1:
                raise PictureFault("format", f"it has {pages} pages; save each as a file of its own")
            stored = _type_of(picture)
            if stored != dtype:
                raise PictureFault("depth", f"its values are {stored}, not {dtype}")
            return np.asarray(picture).astype(dtype)[:, :, None]
    except (PictureFault, MemoryError):
        raise
    except Exception as error:
        raise PictureFault("damaged", f"it does not decode ({error})") from error


def checked(values: Values) -> Values:
    """The values, if all are finite. Raises PictureFault."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        strange = int((~np.isfinite(values)).sum())
        raise PictureFault("depth", f"{strange} of its {values.size} values are NaN or infinite")
    return values


def resize_deep(values: Values, size: tuple[int, int], resample: Image.Resampling) -> Values:
    """Values [H, W, C] of any type and number of channels, resized in float32 channel by channel; integers are rounded."""
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(size[::-1], resample))
        for plane in np.moveaxis(values, 2, 0)
    ]
    resized = np.stack(planes, axis=2)
    if values.dtype.kind == "f":
        return resized
    bounds: Any = np.iinfo(values.dtype)
    rounded: Values = np.rint(resized).clip(bounds.min, bounds.max).astype(values.dtype)
    return rounded


def _type_of(picture: Image.Image) -> str:
    """The type of the values of an open image, in words where shards hold no such type."""
    if not isinstance(picture, TiffImageFile):
        return "uint8" if picture.mode in ("L", "RGB", "RGBA") else f"of the mode {picture.mode}"
    bits = picture.tag_v2.get(_BITS, (1,))
    kind = picture.tag_v2.get(_FORMAT, (1,))
    if picture.mode == "F" and bits[0] == 32:
        return "float32"
    if bits[0] == 16:
        return "int16" if kind[0] == _SIGNED else "uint16"
    return "uint8" if bits[0] == 8 else f"{bits[0]} bits"
