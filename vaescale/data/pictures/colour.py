"""Colours of decoded images: ICC profiles to sRGB, transparency on a colour, and the number of channels.

An image file's numbers mean colours only together with its profile (ICC.1:2022); those of files without one are taken as sRGB.
Little CMS converts, by Pillow's ImageCms, with the perceptual intent.
"""

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor

from vaescale.data.pictures.faults import PictureFault

MOST_PROFILE_BYTES = 1 << 24
NEAR = 1  # of 255: a profile that moves no value by more is sRGB
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]
Kind = Literal["srgb", "other", "broken"]
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def profile_kind(profile: bytes | None, mode: str) -> Kind:
    """Whether an ICC profile is sRGB, another one, or unusable with images of a mode (L, RGB or CMYK).

    A profile is sRGB if its description begins with that name, or if it moves no value of a grid by more than 1 of 255.
    """
    return _transform(profile or b"", mode)[0]


def to_srgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, Kind]:
    """Convert an image of mode L, RGB or CMYK from its ICC profile to sRGB; L stays L, and CMYK becomes RGB in any case.

    Returns the image and the kind of the profile. With a broken profile, and with sRGB, values stay as they are.
    """
    kind, transform = _transform(profile or b"", picture.mode)
    if transform is None:
        return (picture.convert("RGB") if picture.mode == "CMYK" else picture), kind
    converted = _apply(transform, picture)
    return (converted.convert("L") if picture.mode == "L" else converted), kind


def parse_colour(text: str) -> Colour:
    """Red, green and blue of a colour: a name such as white, or #rrggbb. Raises ValueError, also for transparent colours."""
    values = ImageColor.getrgb(text)
    if len(values) == 4 and values[3] < 255:
        raise ValueError(f"the colour {text} is transparent")
    return values[:3]


def flatten(image: Picture, alpha: Picture, colour: Colour) -> Picture:
    """Put a transparent image [H, W, C] with alpha [H, W] on a colour. Grey stays grey on a grey."""
    if image.shape[2] == 1 and len(set(colour)) > 1:
        image = np.repeat(image, 3, axis=2)
    behind = np.array(colour[: image.shape[2]], np.uint16)
    weight = alpha[:, :, None].astype(np.uint16)
    return ((image * weight + behind * (255 - weight) + 127) // 255).astype(np.uint8)


def is_grey(image: Picture) -> bool:
    """Whether all channels are equal."""
    if image.shape[2] != 3:
        return bool(image.shape[2] == 1)
    red, green, blue = map(
        int, image[image.shape[0] // 2, image.shape[1] // 2]
    )  # most images have colour there
    return red == green == blue and bool((image == image[:, :, :1]).all())


def to_channels(image: Picture, channels: int, *, grey_from_colour: bool = False) -> Picture:
    """The image with 1 or 3 channels, or as many as it has. Colour becomes grey (ITU-R 601 luma) only where that is asked for.

    Raises PictureFault when colour would be lost.
    """
    if image.shape[2] == channels:
        return image
    if channels not in (1, 3) or image.shape[2] not in (1, 3):
        raise PictureFault("shape", f"it has {image.shape[2]} channels, not {channels}")
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    if grey_from_colour:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    if (image == image[:, :, :1]).all():
        return image[:, :, :1]
    raise PictureFault("colour", "a colour image in a grey set; use 3 channels or write the shards as grey")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[Kind, ImageCms.ImageCmsTransform | None]:
    """The kind of a profile, and its transform to sRGB where that changes something. It is built once for all images of a camera."""
    if not 0 < len(profile) <= MOST_PROFILE_BYTES:
        return "broken", None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = _SPACES.get(opened.profile.xcolor_space.strip())
        if space != mode and (space, mode) != (
            "RGB",
            "L",
        ):  # grey files often have the profile of an RGB original
            return "broken", None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), str(space), "RGB")
        if (opened.profile.profile_description or "").startswith("sRGB"):
            return "srgb", None
        grid = _grid(mode)
        moved = np.asarray(_apply(transform, grid), np.int16) - np.asarray(grid.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "broken", None
    if mode != "CMYK" and np.abs(moved).max() <= NEAR:
        return "srgb", None
    return "other", transform


def _apply(transform: ImageCms.ImageCmsTransform, picture: Image.Image) -> Image.Image:
    picture = picture if picture.mode == transform.input_mode else picture.convert(transform.input_mode)
    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None  # it is not done in place
    return converted


def _grid(mode: str) -> Image.Image:
    """Values of a mode that cover its space."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9 if mode == "RGB" else 4).astype(np.uint8)
    axes = np.meshgrid(*[levels] * len(mode), indexing="ij")
    return Image.merge(mode, [Image.fromarray(axis.reshape(1, -1)) for axis in axes])
