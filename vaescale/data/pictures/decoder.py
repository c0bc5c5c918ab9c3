"""Decoding of image files to uint8 [H, W, C].

JPEG is decoded by simplejpeg, strict and with the exact DCT; PNG and WebP by Pillow; npy without pickle. Dimensions are
checked before anything is decoded. What would silently lose information (16 bits, transparency) is a fault with a name.
"""

import io
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from vaescale.data.pictures.colour import Colour, Kind, Picture, flatten, profile_kind, to_srgb
from vaescale.data.pictures.containers import box_bits, is_jxl, jxl_header
from vaescale.data.pictures.faults import PictureFault
from vaescale.data.pictures.foreign import open_foreign
from vaescale.data.pictures.header import (
    JPEG,
    KEEP,
    SCALE,
    Header,
    is_known,
    npy_layout,
    read_header,
    refuse_size,
)
from vaescale.data.pictures.metadata import (
    ORIENTATION,
    UPRIGHT,
    jpeg_orientation,
    stated_orientation,
    turn,
    xmp_turns,
)
from vaescale.data.pictures.tiff import channels_of, decode_tiff, is_tiff

_BITS_PER_SAMPLE = 258  # the tag of TIFF
_COLOUR_MODES = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"), "RGB"),
    "CMYK": "CMYK",
}
_DEPTHS = {"I": "32-bit integers", "F": "floating-point numbers"}
FLATTEN = "it is transparent; write the shards with --flatten white, or another colour, or with --channels 4 to keep its alpha channel"


class Decoded(NamedTuple):
    """A decoded image [H, W, C], and what was done to it.

    profile: the kind of its ICC profile, None where it has none. turned: by its orientation. flattened: it was transparent.
    format: of its file, such as jpg or tiff. only_xmp: only XMP says that it is to be turned, which is not done.
    """

    image: Picture
    turned: bool = False
    profile: Kind | None = None
    flattened: bool = False
    format: str = "array"
    only_xmp: bool = False


def decode(content: bytes) -> Picture:
    """Decode an image to uint8 [H, W, 1] or [H, W, 3], of npy up to 16 channels, upright. Palettes and CMYK become RGB; an opaque alpha channel is dropped.

    ICC profiles are not used: `decode_source` does that when shards are written. Raises PictureFault.
    """
    try:
        if content.startswith(JPEG):  # most images are JPEG, whose header is then read only once
            orientation = jpeg_orientation(content)
            image = _decode_jpeg(content)
            return image if orientation == UPRIGHT else turn(image, orientation)
        header = read_header(content)
        if header.format == "npy":
            return _decode_npy(content)
        with _open(content, header) as picture:
            plain = picture.mode in ("L", "RGB") and not picture.info and header.orientation == UPRIGHT
            if (
                plain
                and getattr(picture, "n_frames", 1) == 1
                and picture.size == (header.width, header.height)
            ):
                return _channels_last(picture)
            return turn(_values(picture, convert=False, colour=None).image, header.orientation)
    except (PictureFault, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files, such as IndexError
        raise PictureFault("damaged", f"it does not decode ({error})") from error


def decode_source(
    content: bytes, *, convert: bool, colour: Colour | None = None, alpha: bool = False
) -> Decoded:
    """Decode an image of a source, also one in a format that shards do not hold, such as BMP, TIFF, GIF, PPM and AVIF.

    convert: to sRGB from the file's ICC profile. colour: what transparent images are put on; None refuses them. alpha: whether an alpha
    channel is kept as the last one.
    Raises PictureFault.
    """
    try:
        if not is_known(content):
            return _decode_foreign(content, convert=convert, colour=colour, alpha=alpha)
        header = read_header(content)
        if header.format == "npy":
            return Decoded(_decode_npy(content), format=header.format)
        convert = convert and header.has_profile
        if header.format == "jpg":
            image = _decode_jpeg(content)
            source = _convert_jpeg(content, image) if convert else Decoded(image)
        else:
            with _open(content, header) as picture:
                source = _values(picture, convert=convert, colour=colour, keeps_alpha=alpha)
    except (PictureFault, MemoryError):
        raise
    except Exception as error:
        raise PictureFault("damaged", f"it does not decode ({error})") from error
    image = turn(source.image, header.orientation)
    turned = header.orientation != UPRIGHT
    return source._replace(image=image, turned=turned, format=header.format, only_xmp=header.only_xmp)


def has_other_profile(content: bytes, header: Header) -> bool:
    """Whether an image that is stored as it is has a usable ICC profile other than sRGB, which reading does not use."""
    if not header.has_profile:
        return False
    try:
        with _open(content, header) as picture:
            return profile_kind(picture.info.get("icc_profile"), _colour_mode(picture)) == "other"
    except MemoryError:
        raise
    except Exception:  # the file is damaged, which is found when it is decoded
        return False


def _open(content: bytes, header: Header) -> Image.Image:
    # Pillow must not guess among its dozens of decoders.
    name = "JPEG" if header.format == "jpg" else header.format.upper()
    return Image.open(io.BytesIO(content), formats=(name,))


def _decode_npy(content: bytes) -> Picture:
    _, shape, start = npy_layout(content)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _decode_jpeg(content: bytes) -> Picture:
    height, width, colour, _ = simplejpeg.decode_jpeg_header(content)
    refuse_size(height, width)
    if colour in ("CMYK", "YCCK"):
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
            return _values(picture, convert=False, colour=None).image
    image: Picture = simplejpeg.decode_jpeg(content, "GRAY" if colour == "Gray" else "RGB")
    return image


def _convert_jpeg(content: bytes, image: Picture) -> Decoded:
    """Convert a JPEG from its profile to sRGB. image: its values, as they are without a profile."""
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        profile, is_cmyk = picture.info.get("icc_profile"), picture.mode == "CMYK"
        values = picture if is_cmyk else Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        converted, kind = to_srgb(values, profile)
    return Decoded(_channels_last(converted) if kind == "other" else image, profile=kind)


def _decode_foreign(content: bytes, *, convert: bool, colour: Colour | None, alpha: bool) -> Decoded:
    if is_jxl(content):  # whose package decodes it at once, to 8 bits
        header = jxl_header(content)
        refuse_size(header.height, header.width)
        if header.bits > 8:
            raise PictureFault("depth", f"its values have {header.bits} bits; {SCALE}")
    if is_tiff(content) and channels_of(content) > 1 and not _keeps_channels(content):
        return Decoded(decode_tiff(content, "uint8"), format="tiff")
    with open_foreign(content) as picture:
        refuse_size(picture.height, picture.width)
        _refuse_bits(content, picture)
        remaining, stated, only_xmp = _foreign_orientation(picture)
        convert = convert and "icc_profile" in picture.info
        source = _values(picture, convert=convert, colour=colour, keeps_alpha=alpha)
        name = (picture.format or "other").lower()
    image = turn(source.image, remaining)
    return source._replace(image=image, turned=stated != UPRIGHT, format=name, only_xmp=only_xmp)


def _keeps_channels(content: bytes) -> bool:
    """Whether Pillow reads a TIFF of several channels, and not the first one alone, which it does of planes."""
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as picture:
            return len(picture.getbands()) > 1
    except Image.DecompressionBombError:  # which it is refused for
        return True
    except Exception:
        return False


def _foreign_orientation(picture: Image.Image) -> tuple[int, int, bool]:
    """The orientation that is not yet applied to an image's values when it is loaded, the one that its file states, and whether
    only XMP states one."""
    xmp = picture.info.pop("xmp", b"")  # by which Pillow would turn a TIFF
    if picture.format == "TIFF":  # Pillow turns it by its tag
        value = picture.getexif().get(ORIENTATION)
        stated = value if isinstance(value, int) and 1 <= value <= 8 else None
        remaining = UPRIGHT
    # HEIC and JPEG XL have rotations of their own, which libheif and libjxl apply; there EXIF has no effect, except in a JPEG
    # XL from which the bytes of a JPEG are restored.
    elif picture.format == "HEIF" or (picture.format == "JXL" and not getattr(picture, "jpeg", False)):
        return UPRIGHT, UPRIGHT, False
    else:
        stated = stated_orientation(picture.info.get("exif") or b"")
        remaining = stated or UPRIGHT
    return remaining, stated or UPRIGHT, stated is None and isinstance(xmp, bytes) and xmp_turns(xmp)


def _refuse_bits(content: bytes, picture: Image.Image) -> None:
    """Refuse AVIF and HEIC images of more than 8 bits, which their decoders cut to 8."""
    bits = box_bits(content) if picture.format in ("AVIF", "HEIF") else 8
    if bits > 8:
        raise PictureFault("depth", f"its values have {bits} bits; {SCALE}")


def _values(
    picture: Image.Image, *, convert: bool, colour: Colour | None, keeps_alpha: bool = False
) -> Decoded:
    """The values of an open image. convert: to sRGB from its profile. colour: for transparent images."""
    refuse_size(picture.height, picture.width)
    _refuse_several(picture)
    _refuse_depth(picture)
    base, alpha = _split_alpha(picture)
    if alpha is not None and colour is None and not keeps_alpha:
        raise PictureFault("transparency", FLATTEN)
    kind = None
    if convert:
        base, kind = to_srgb(base, picture.info.get("icc_profile"))
    image = _channels_last(base.convert("RGB") if base.mode == "CMYK" else base)
    if keeps_alpha:
        opaque = np.full(image.shape[:2], 255, np.uint8) if alpha is None else alpha
        return Decoded(np.concatenate([image, opaque[:, :, None]], axis=2), profile=kind)
    if alpha is not None and colour is not None:
        image = flatten(image, alpha, colour)
    return Decoded(image, profile=kind, flattened=alpha is not None)


def _split_alpha(picture: Image.Image) -> tuple[Image.Image, Picture | None]:
    """The colours of an image in mode L, RGB or CMYK, and its alpha channel [H, W] unless it is opaque."""
    mode = _colour_mode(picture)
    if picture.mode in ("LA", "P", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        alpha = np.asarray(rgba.getchannel("A"))
        base = rgba.getchannel("R") if mode == "L" else rgba.convert("RGB")
        return base, alpha if alpha.min() < 255 else None
    return picture if picture.mode == mode else picture.convert(mode), None


def _colour_mode(picture: Image.Image) -> str:
    return _COLOUR_MODES.get(picture.mode, "RGB")


def _channels_last(picture: Image.Image) -> Picture:
    image = np.asarray(picture)
    return image if image.ndim == 3 else image[:, :, None]


def _refuse_several(picture: Image.Image) -> None:
    number = getattr(picture, "n_frames", 1)
    if number > 1:
        several = {"TIFF": f"it has {number} pages", "HEIF": f"it holds {number} images"}
        what = several.get(picture.format or "", f"it is an animation of {number} frames")
        raise PictureFault("format", f"{what}; save the one that you want as a file of its own")


def _refuse_depth(picture: Image.Image) -> None:
    """Refuse values of more than 8 bits a channel, some of which Pillow would cut to 8, and colours that are not RGB."""
    values = _DEPTHS.get(picture.mode)
    bits = _bits(picture)
    if values is not None and bits != 16:
        raise PictureFault("depth", f"its values are {values}; {KEEP}")
    if bits > 8 or picture.mode.startswith("I;16"):
        raise PictureFault("depth", f"its values have {max(bits, 16)} bits; {KEEP}")
    if picture.mode not in _COLOUR_MODES:
        raise PictureFault("depth", f"its colours are {picture.mode}; save it as RGB first")


def _bits(picture: Image.Image) -> int:
    """The bits of each value in the file, where it may have more than 8."""
    if isinstance(picture, TiffImageFile):
        return int(max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if isinstance(
        picture, PpmImageFile
    ):  # a decoder's arguments: the layout of raw values, or the greatest value
        arguments: Any = picture.tile[0].args or ()
        numbers = [value for value in arguments if isinstance(value, int)]
        return 16 if "I;16B" in arguments or max(numbers, default=0) > 255 else 8
    return 8
