"""Image files, which are not trusted: decoding of bytes to uint8 [H, W, C], resizing, and encoding.

The first bytes decide the format, never a name. Dimensions are read from the header before anything is decoded. What would
silently lose information (16 bits, transparency, colour in a grey set) is a fault with a name.
JPEG is decoded by simplejpeg, strict and with the exact DCT; PNG and WebP by Pillow; npy without pickle. Bilinear and
bicubic resizing is torch's for 8-bit images, five times as fast as Pillow's and equal to it but for the last bit.
"""

import io
import re
import struct
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vaescale.data.config import Crop, Filter

MAX_PIXELS = 1 << 26  # 67 megapixels: more than any photograph of the usual sets, 200 MB decoded
_JPEG = b"\xff\xd8\xff"
_NPY_HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9})(?:, ([13]))?\), \} *\n"
)
Picture = NDArray[np.uint8]
Encoding = Literal["npy", "png", "webp", "jpg"]
FILTERS: dict[Filter, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
REASONS = ("changed", "damaged", "format", "pixels", "depth", "transparency", "colour", "shape")


class PictureFault(ValueError):
    """The fault of an image that cannot be used. reason: one of REASONS; the message is a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Header(NamedTuple):
    """The header of an image: jpg, png, webp or npy; height, width and channels (1 or 3) as `decode` returns them."""

    format: str
    height: int
    width: int
    channels: int


def is_known(content: bytes) -> bool:
    """Whether a file begins with the signature of a format that shards hold."""
    return any(content.startswith(magic) for magic in _HEADERS)


def read_header(content: bytes) -> Header:
    """Read format and size, without decoding. Raises PictureFault for other formats and above MAX_PIXELS."""
    reader = next((reader for magic, reader in _HEADERS.items() if content.startswith(magic)), None)
    if reader is None:
        raise PictureFault(
            "format", f"it begins with {content[:8].hex()}: not a JPEG, PNG, WebP or npy image"
        )
    try:
        header = reader(content)
    except (ValueError, TypeError, SyntaxError, EOFError, struct.error, IndexError) as error:
        if isinstance(error, PictureFault):
            raise
        raise PictureFault("damaged", f"its header cannot be read ({error})") from error
    _refuse_size(header.height, header.width)
    return header


def decode(content: bytes) -> Picture:
    """Decode an image to uint8 [H, W, 1] or [H, W, 3]. Palettes and CMYK become RGB; an opaque alpha channel is dropped.

    Raises PictureFault.
    """
    try:
        if content.startswith(_JPEG):  # most images are JPEG, whose header is then read only once
            return _decode_jpeg(content)
        header = read_header(content)
        if header.format == "npy":
            return _decode_npy(content)
        return _decode_with_pillow(content, header.format.upper())
    except (PictureFault, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files, such as IndexError
        raise PictureFault("damaged", f"it does not decode ({error})") from error


def decode_foreign(content: bytes) -> Picture:
    """Decode a BMP, TIFF, GIF, PPM or PGM, which shards do not hold, as `decode` does. Raises PictureFault."""
    try:
        return _decode_with_pillow(content, "BMP", "TIFF", "GIF", "PPM")
    except (PictureFault, MemoryError):
        raise
    except Exception as error:
        raise PictureFault(
            "format", f"it begins with {content[:8].hex()}: not a known image format"
        ) from error


def to_channels(image: Picture, channels: int, *, grey_from_colour: bool = False) -> Picture:
    """The image with 1 or 3 channels. Colour becomes grey (ITU-R 601 luma) only where that is asked for.

    Raises PictureFault when colour would be lost.
    """
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    if grey_from_colour:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    if (image == image[:, :, :1]).all():
        return image[:, :, :1]
    raise PictureFault("colour", "a colour image in a grey set; use 3 channels or write the shards as grey")


def fit(image: Picture, *, size: int, crop: Crop | None, resample: Filter) -> Picture:
    """Crop an image in the centre and resize it, to uint8 [size, size, C].

    crop: pixels of the centre square that is kept; `square`, the largest one; `whole`, all of it, so that the aspect
    changes; None, the image must have that size already. Raises PictureFault for one that does not, or is too small.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size) and crop in (None, "square", "whole", size):
        return image
    if crop is None:
        raise PictureFault("shape", f"{height}x{width} pixels, not {size}x{size}; set a crop to resize")
    cut_height, cut_width = (
        (height, width) if crop == "whole" else (min(height, width),) * 2 if crop == "square" else (crop,) * 2
    )
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    if top < 0 or left < 0:
        raise PictureFault("shape", f"{height}x{width} pixels, too small for a crop of {crop}")
    if (cut_height, cut_width) == (size, size):
        return image[top : top + size, left : left + size]
    return _resize(image[top : top + cut_height, left : left + cut_width], size, resample)


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


def _resize(image: Picture, size: int, resample: Filter) -> Picture:
    if resample in ("bilinear", "bicubic"):
        import torch  # late: it takes a second to import, and not every user of this module resizes

        writable = image if image.flags.writeable else image.copy()
        tensor = torch.from_numpy(writable).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(tensor, (size, size), mode=resample, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
    source = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0]))
    return np.asarray(source.resize((size, size), FILTERS[resample])).reshape(size, size, -1)


def _jpeg_header(content: bytes) -> Header:
    height, width, colour, _ = simplejpeg.decode_jpeg_header(content)
    return Header("jpg", height, width, 1 if colour == "Gray" else 3)


def _png_header(content: bytes) -> Header:
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    if depth == 16:
        raise PictureFault("depth", "a 16-bit PNG, of which only 8 bits could be read; convert it")
    return Header("png", height, width, 1 if colour in (0, 4) else 3)  # grey, grey with alpha


def _webp_header(content: bytes) -> Header:
    kind = content[12:16]
    if kind == b"VP8X":  # extended
        width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":  # lossless
        bits = int.from_bytes(content[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack("<HH", content[26:30]))
    else:
        raise PictureFault("format", "a RIFF file that is not a WebP image")
    return Header("webp", height, width, 3)


def _npy_header(content: bytes) -> Header:
    shape, _ = _npy_layout(content)
    return Header("npy", *shape)


_HEADERS = {
    _JPEG: _jpeg_header,
    b"\x89PNG\r\n\x1a\n": _png_header,
    b"RIFF": _webp_header,
    b"\x93NUMPY": _npy_header,
}


def _npy_layout(content: bytes) -> tuple[tuple[int, int, int], int]:
    """The shape of an npy file, and the offset of its values. Only the header that numpy writes for uint8 is accepted."""
    length = struct.unpack("<H", content[8:10])[0]
    header, start = content[10 : 10 + length], 10 + length
    if len(header) < length:
        raise PictureFault("damaged", "its header is cut")
    match = _NPY_HEADER.fullmatch(header)
    if content[6:8] != b"\x01\x00" or match is None:
        raise PictureFault(
            "shape", f"an npy array {header[:80].decode('latin-1').strip()}, not uint8 [H, W, 1 or 3]"
        )
    height, width, channels = (int(number or 1) for number in match.groups())
    return (height, width, channels), start


def _decode_npy(content: bytes) -> Picture:
    shape, start = _npy_layout(content)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _refuse_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS or min(height, width) < 1:
        raise PictureFault("pixels", f"{height}x{width} pixels; at most {MAX_PIXELS} are read")


def _decode_jpeg(content: bytes) -> Picture:
    height, width, colour, _ = simplejpeg.decode_jpeg_header(content)
    _refuse_size(height, width)
    if colour in ("CMYK", "YCCK"):
        return _decode_with_pillow(content, "JPEG")
    image: Picture = simplejpeg.decode_jpeg(content, "GRAY" if colour == "Gray" else "RGB")
    return image


def _decode_with_pillow(content: bytes, *formats: str) -> Picture:
    # Pillow must not guess among its dozens of decoders.
    with Image.open(io.BytesIO(content), formats=formats) as picture:
        _refuse_size(picture.height, picture.width)
        if getattr(picture, "n_frames", 1) > 1:
            raise PictureFault("format", "an animation")
        if picture.mode in ("1", "L", "RGB") and "transparency" not in picture.info:
            image = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        elif picture.mode == "CMYK":
            image = np.asarray(picture.convert("RGB"))
        elif picture.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            rgba = np.asarray(picture.convert("RGBA"))
            if rgba[:, :, 3].min() < 255:
                raise PictureFault("transparency", "it is transparent; flatten it first")
            image = rgba[:, :, :1] if picture.mode in ("1", "L", "LA") else rgba[:, :, :3]
        else:
            raise PictureFault("depth", f"its values are {picture.mode}, not 8 bits a channel")
    return image if image.ndim == 3 else image[:, :, None]
