"""Size and bits of a value in files that are made of boxes: AVIF and HEIC (ISO/IEC 14496-12 and 23008-12), JPEG XL (18181-1).

Their decoders return 8 bits whatever the file holds, so its header is asked before. The number of boxes that are looked at is
bounded.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vaescale.data.pictures.faults import PictureFault

MOST_BOXES = 1000
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_CODESTREAM_BYTES = 64  # of a JPEG XL, which hold the size and the bits


class JxlHeader(NamedTuple):
    """The header of a JPEG XL: height, width, and bits of a value (32 for most floating-point numbers)."""

    height: int
    width: int
    bits: int


def box_bits(content: bytes) -> int:
    """The bits of a value of the main image in an AVIF or HEIC; 8 where its boxes do not tell.

    From its properties pixi, av1C or hvcC; from those of all images where it has none, as an image made of tiles.
    """
    try:
        return _box_bits(content)
    except (struct.error, IndexError):  # it ends early, which decoding finds
        return 8


def is_jxl(content: bytes) -> bool:
    """Whether a file begins as a JPEG XL image."""
    return content.startswith(_JXL)


def jxl_header(content: bytes) -> JxlHeader:
    """The header of a JPEG XL image. Raises PictureFault."""
    codestream = _codestream(content)
    if codestream[:2] != _JXL[0] or len(codestream) < 12:
        raise PictureFault("damaged", "its header is cut")
    bits = int.from_bytes(codestream[2:], "little")

    def read(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    def size() -> tuple[int, int]:
        eighths = read(1)
        height = length(eighths)
        ratio = read(3)
        above, below = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
        return height, height * above // below if ratio else length(eighths)

    def length(eighths: int) -> int:
        return 8 * (1 + read(5)) if eighths else 1 + read((9, 13, 18, 30)[read(2)])

    height, width = size()
    if read(1):  # all metadata have their defaults
        return JxlHeader(height, width, 8)
    if read(1):  # there are orientation, intrinsic size, preview and animation
        read(3)
        if read(1):
            size()
        if read(1) or read(
            1
        ):  # a preview or an animation, whose headers are long: decoding refuses the latter
            return JxlHeader(height, width, 8)
    is_float, choice = read(1), read(2)
    value_bits = ((8, 10, 12), (32, 16, 24))[is_float][choice] if choice < 3 else 1 + read(6)
    return JxlHeader(height, width, value_bits)


def _codestream(content: bytes) -> bytes:
    """The beginning of the codestream, in a container or bare."""
    if content.startswith(_JXL[0]):
        return content[:_CODESTREAM_BYTES]
    for kind, start, stop in _boxes(content, 0, len(content)):
        if kind in (b"jxlc", b"jxlp"):
            start += 4 * (kind == b"jxlp")
            return content[start : min(stop, start + _CODESTREAM_BYTES)]
    raise PictureFault("damaged", "it is a JPEG XL file without a codestream")


def _boxes(content: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and stop of the content of each box."""
    for _ in range(MOST_BOXES):
        if at + 8 > end:
            return
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        start = at + 8
        if size == 1:
            size, start = int.from_bytes(content[start : start + 8], "big"), start + 8
        size = end - at if size == 0 else size
        if size < start - at:
            return
        yield kind, start, min(end, at + size)
        at += size


def _box_bits(content: bytes) -> int:
    inner: dict[bytes, tuple[int, int]] = {}
    for kind, start, stop in _boxes(content, 0, len(content)):
        if kind == b"meta":
            inner = {name: (a, b) for name, a, b in _boxes(content, start + 4, stop)}
            break
    if b"iprp" not in inner:
        return 8
    parts = {name: (a, b) for name, a, b in _boxes(content, *inner[b"iprp"])}
    properties = [_property_bits(content, *box) for box in _boxes(content, *parts.get(b"ipco", (0, 0)))]
    main = _main_image(content, inner.get(b"pitm"))
    numbers = _properties_of(content, parts.get(b"ipma"), main)
    stated = [properties[number - 1] for number in numbers if 0 < number <= len(properties)]
    return max(stated, default=0) or max(properties, default=0) or 8


def _property_bits(content: bytes, kind: bytes, start: int, stop: int) -> int:
    """The bits that a property states; 0 for other properties."""
    if kind == b"pixi":
        return max(content[start + 5 : min(stop, start + 5 + content[start + 4])], default=0)
    if kind == b"av1C":
        is_high, is_twelve = content[start + 2] & 0x40, content[start + 2] & 0x20
        return (12 if is_twelve else 10) if is_high else 8
    if kind == b"hvcC":
        return 8 + max(content[start + 17] & 7, content[start + 18] & 7)
    return 0


def _main_image(content: bytes, box: tuple[int, int] | None) -> int:
    if box is None:
        return 0
    start, _ = box
    number: int = struct.unpack_from(">I" if content[start] else ">H", content, start + 4)[0]
    return number


def _properties_of(content: bytes, box: tuple[int, int] | None, main: int) -> list[int]:
    """The numbers of an image's properties, from 1 on."""
    if box is None:
        return []
    at, stop = box
    version, is_wide = content[at], content[at + 3] & 1
    (entries,) = struct.unpack_from(">I", content, at + 4)
    at += 8
    for _ in range(min(entries, MOST_BOXES)):
        if at >= stop:
            break
        (image,) = struct.unpack_from(">I" if version else ">H", content, at)
        at += 4 if version else 2
        count = content[at]
        numbers = struct.unpack_from(f">{count}{'H' if is_wide else 'B'}", content, at + 1)
        at += 1 + count * (2 if is_wide else 1)
        if image == main:
            return [number & (0x7FFF if is_wide else 0x7F) for number in numbers]
    return []
