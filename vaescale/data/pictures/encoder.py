"""Encoding of images as files."""

import io
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from vaescale.data.pictures.colour import Picture
from vaescale.data.pictures.faults import PictureFault

Encoding = Literal["npy", "png", "webp", "jpg"]


def encode(image: Picture, encoding: Encoding, *, quality: int = 95) -> bytes:
    """Encode an image [H, W, C] as a file. png, webp and npy are lossless; quality is JPEG's.

    uint8 of 1 or 3 channels; npy takes any type and number of channels, png also uint16 of one. Raises PictureFault.
    """
    plain = encoding == "npy" or (image.dtype == np.uint8 and image.shape[2] in (1, 3))
    deep = encoding == "png" and image.dtype == np.uint16 and image.shape[2] == 1
    if not (plain or deep):
        raise PictureFault(
            "shape",
            f"{encoding} does not hold {image.dtype} of {image.shape[2]} channels; take --encoding npy",
        )
    if encoding == "jpg":
        colour = ("RGB", "444") if image.shape[2] == 3 else ("GRAY", "Gray")
        jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, *colour)
        return jpeg
    buffer = io.BytesIO()
    if encoding == "npy":
        np.save(buffer, image, allow_pickle=False)
    else:
        options: dict[str, Any] = {"lossless": True, "exact": True} if encoding == "webp" else {}
        squeezed = image if image.shape[2] == 3 else image[:, :, 0]
        Image.fromarray(squeezed).save(buffer, encoding.upper(), **options)
    return buffer.getvalue()
