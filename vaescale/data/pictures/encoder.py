"""Encoding of images as files."""

import io
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from vaescale.data.pictures.colour import Picture

Encoding = Literal["npy", "png", "webp", "jpg"]


def encode(image: Picture, encoding: Encoding, *, quality: int = 95) -> bytes:
    """Encode an image uint8 [H, W, C] as a file. png, webp and npy are lossless; quality is JPEG's."""
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
