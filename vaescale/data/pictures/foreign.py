"""Formats that shards do not hold, which are read to be written anew, and the true name of files that are no images."""

import importlib
import io
import re
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError, features

from vaescale.data.pictures.containers import is_jxl
from vaescale.data.pictures.faults import PictureFault

# Where the format is known by its first bytes but not read: the name, and the package that reads it, if any.
_SIGNATURES = {
    b"<!doctype html": "an HTML page, as servers send in place of a missing file",
    b"<html": "an HTML page, as servers send in place of a missing file",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (`git lfs pull` fetches it)",
    b"<svg": "an SVG drawing; save it as PNG",
    b"<?xml": "an XML file",
    b"%pdf": "a PDF document; save its pages as PNG",
    b"8bps": "a Photoshop document; save it as PNG",
    b"\0\0\0\x0cjp  ": "a JPEG 2000 image; save it as PNG",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image; save it as PNG",
    b"v/1\x01": "an OpenEXR image; save it as 8-bit PNG",
    b"#?radiance": "a Radiance HDR image; save it as 8-bit PNG",
    b"\x89hdf": "an HDF5 file",
    b"matlab": "a MATLAB file",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"simple  =": "a FITS image; save it as 8-bit PNG",
}
_READ = (b"BM", b"II*\0", b"MM\0*", b"GIF8", *(b"P%d" % number for number in range(1, 7)))
_AVIF, _HEIC = (b"avif", b"avis"), (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


class _Package(NamedTuple):
    """A package that reads a format: what pip calls it, its module, and its class for Pillow."""

    name: str
    module: str
    opener: str


_PACKAGES = {
    "HEIC": _Package("pillow-heif", "pillow_heif", "HeifImageFile"),
    "JPEG XL": _Package("pillow-jxl-plugin", "pillow_jxl.JpegXLImagePlugin", "JXLImageFile"),
}


def what_it_is(content: bytes) -> str:
    """What a file without the signature of a known format is, as a phrase."""
    return known_as(content) or f"it begins with {content[:8].hex()}: not a known image format"


def known_as(content: bytes) -> str | None:
    """What a file of another format is, as a phrase; None where its beginning does not tell."""
    if not content:
        return "it is empty (0 bytes)"
    if not any(content):
        return f"it is {len(content)} zeros, as after a copy that failed"
    start = content[:64].lstrip().lower()
    for signature, name in _SIGNATURES.items():
        if start.startswith(signature):
            return f"it is {name}"
    other = _other_format(content)
    return None if other is None else f"it is {other}"


def open_foreign(content: bytes) -> Image.Image:
    """Open a BMP, TIFF, GIF, PPM, PGM or AVIF, or a HEIC or JPEG XL where a package for them is installed; nothing is decoded.

    Raises PictureFault for other files, with the package that reads them if there is one.
    """
    name = _other_format(content)
    if name == "an AVIF image" and not ("avif" in features.modules and features.check("avif")):
        raise PictureFault("format", "it is an AVIF image; `pip install 'pillow>=11.3'` reads it")
    if name in ("a HEIC image", "a JPEG XL image"):
        return _open_with_package(content, name.split(maxsplit=1)[1].removesuffix(" image"))
    formats = ("AVIF",) if name == "an AVIF image" else ("BMP", "TIFF", "GIF", "PPM")
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:
        raise PictureFault("pixels", f"it has too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        if content.startswith(_READ) or formats == ("AVIF",):
            raise PictureFault("damaged", "its header cannot be read") from error
        raise PictureFault("format", what_it_is(content)) from error


def _open_with_package(content: bytes, name: str) -> Image.Image:
    package = _PACKAGES[name]
    try:
        opener = getattr(importlib.import_module(package.module), package.opener)
    except ImportError as error:
        raise PictureFault(
            "format", f"it is a {name} image; `pip install {package.name}` reads it"
        ) from error
    picture: Image.Image = opener(io.BytesIO(content))
    return picture


def _other_format(content: bytes) -> str | None:
    """The name of a format with a box structure, or JPEG XL."""
    if is_jxl(content):
        return "a JPEG XL image"
    if content[4:8] != b"ftyp":
        return None
    brands = re.findall(b"(?s)....", content[8 : min(64, int.from_bytes(content[:4], "big"))])
    if any(brand in brands for brand in _AVIF):
        return "an AVIF image"
    if any(brand in brands for brand in _HEIC):
        return "a HEIC image"
    return "a video or another file of the MP4 family"
