"""The header of an image file: format, size and channels, read before anything is decoded.

The first bytes decide the format, never a name.
"""

import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

from vaescale.config import Dtype
from vaescale.data.pictures.faults import PictureFault
from vaescale.data.pictures.foreign import what_it_is
from vaescale.data.pictures.metadata import Metadata, jpeg_metadata, png_metadata, webp_metadata

MAX_PIXELS = 1 << 26  # 67 megapixels: more than any photograph of the usual sets, 200 MB decoded
SCALE = "shards hold 8 bits a value, so scale it to 0 to 255 first"
KEEP = "keep them with --dtype, or scale it to 0 to 255 first"  # of files that `deep.py` reads
MOST_CHANNELS = 16
JPEG = b"\xff\xd8\xff"
_NPY = "save one image as uint8 [H, W], [H, W, 1] or [H, W, 3] in C order; uint16, int16, float32 and up to 16 channels are read too"
_NPY_HEADER = re.compile(
    rb"\{'descr': '(\|u1|<u2|<i2|<f4)', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9})(?:, ([1-9]\d?))?\), \} *\n"
)
_ANY_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), 'shape': \(([\d, L]{0,100})\)"
)

_TYPES: dict[bytes, Dtype] = {b"|u1": "uint8", b"<u2": "uint16", b"<i2": "int16", b"<f4": "float32"}


class Header(NamedTuple):
    """The header of an image: jpg, png, webp or npy; height, width and channels (1 or 3, in npy up to 16) as `decode` returns them.

    orientation: of EXIF, already applied to height and width. has_profile: whether the file has an ICC profile. only_xmp: whether
    only XMP says that it is to be turned, which is not applied. dtype: the type of its values. frames: of a sequence, 0 of an image.
    """

    format: str
    height: int
    width: int
    channels: int
    orientation: int = 1
    has_profile: bool = False
    only_xmp: bool = False
    dtype: Dtype = "uint8"
    frames: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels


def is_known(content: bytes) -> bool:
    """Whether a file begins with the signature of a format that shards hold."""
    return any(content.startswith(magic) for magic in _HEADERS)


def read_header(content: bytes, dtype: Dtype = "uint8") -> Header:
    """Read format and size, without decoding. Raises PictureFault for other formats, above MAX_PIXELS, and for values of another type."""
    reader = next((reader for magic, reader in _HEADERS.items() if content.startswith(magic)), None)
    if reader is None:
        raise PictureFault("format", f"{what_it_is(content)}; shards hold JPEG, PNG, WebP and npy images")
    try:
        header = reader(content)
    except (ValueError, TypeError, SyntaxError, EOFError, struct.error, IndexError) as error:
        if isinstance(error, PictureFault):
            raise
        raise PictureFault("damaged", f"its header cannot be read ({error})") from error
    refuse_size(header.height, header.width)
    if header.dtype != dtype:
        remedy = f"keep them with --dtype {header.dtype}"
        remedy += ", or scale it to 0 to 255 first" if dtype == "uint8" else ""
        raise PictureFault("depth", f"its values are {header.dtype}, not {dtype}; {remedy}")
    return header


def refuse_size(height: int, width: int) -> None:
    """Raise PictureFault above MAX_PIXELS and below one pixel."""
    if height * width > MAX_PIXELS or min(height, width) < 1:
        raise PictureFault("pixels", f"{height}x{width} pixels; at most {MAX_PIXELS} are read")


def npy_layout(content: bytes) -> tuple[Dtype, tuple[int, int, int], int]:
    """The type and shape of an npy file, and the offset of its values. Only the headers that numpy writes are accepted."""
    length = struct.unpack("<H", content[8:10])[0]
    header, start = content[10 : 10 + length], 10 + length
    if len(header) < length:
        raise PictureFault("damaged", "its header is cut")
    match = _NPY_HEADER.fullmatch(header)
    if content[6:8] != b"\x01\x00" or match is None:
        raise PictureFault("shape", f"it is {_npy_array(header)}; {_NPY}")
    kind, *shape = match.groups()
    height, width, channels = (int(number or 1) for number in shape)
    if channels > MOST_CHANNELS or (
        channels not in (1, 3) and height in (1, 3, 4)
    ):  # the latter are channels that come first
        raise PictureFault("shape", f"it is {_npy_array(header)}; {_NPY}")
    return _TYPES[kind], (height, width, channels), start


def _npy_array(header: bytes) -> str:
    """An array in words, by the header of its file."""
    match = _ANY_NPY_HEADER.match(header)
    if match is None:
        return "an npy array of records"
    kind, fortran, shape = (part.decode("latin-1") for part in match.groups())
    order = ", in Fortran order" if fortran == "True" else ""
    try:
        name = np.dtype(kind).name
    except TypeError:
        name = kind
    return f"an npy array {name} [{shape.rstrip(',')}]{order}"


def _jpeg_header(content: bytes) -> Header:
    height, width, colour, _ = simplejpeg.decode_jpeg_header(content)
    return _upright("jpg", height, width, 1 if colour == "Gray" else 3, jpeg_metadata(content))


def _png_header(content: bytes) -> Header:
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    if depth == 16 and colour:
        raise PictureFault(
            "depth",
            "its values have 16 bits in several channels, which Pillow cuts; save it as npy and give --dtype, or scale it to 0 to 255 first",
        )
    if depth == 16:
        return Header("png", height, width, 1, dtype="uint16")
    channels = 1 if colour in (0, 4) else 3  # grey, grey with alpha
    return _upright("png", height, width, channels, png_metadata(content))


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
    return _upright("webp", height, width, 3, webp_metadata(content))


def _npy_header(content: bytes) -> Header:
    dtype, shape, _ = npy_layout(content)
    return Header("npy", *shape, dtype=dtype)


def _upright(name: str, height: int, width: int, channels: int, metadata: Metadata) -> Header:
    if metadata.orientation >= 5:
        height, width = width, height
    return Header(name, height, width, channels, *metadata)


_HEADERS = {
    JPEG: _jpeg_header,
    b"\x89PNG\r\n\x1a\n": _png_header,
    b"RIFF": _webp_header,
    b"\x93NUMPY": _npy_header,
}
