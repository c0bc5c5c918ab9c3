"""Images that a Python program gives: arrays, tensors, PIL images and lists of these, checked, to the arrays of shards.

The same numbers can mean different images: 1 is black of 0 to 255 and white of 0 to 1, and 3x3 images with 3 channels fit both
orders of axes. What has two meanings is refused. Images of another depth than 8 bits are given as their shards hold them.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vaescale.config import Window
from vaescale.data.config import MOST_CLIPPED
from vaescale.data.pictures.colour import to_channels
from vaescale.data.pictures.faults import PictureFault
from vaescale.errors import UserError

Layout = Literal["NCHW", "NHWC"]
MODES = {"L": "L", "1": "L", "RGB": "RGB"}
"""The modes of PIL images that are taken, and the mode that each is read in."""


class Levels(NamedTuple):
    """Images [N, C, H, W] of the type that the shards hold, and the order of axes in which they were given."""

    images: NDArray[Any]
    layout: Layout


def as_levels(
    images: Any,
    image_shape: tuple[int, int, int],
    *,
    layout: Layout | None = None,
    name: str = "images",
    window: Window = Window(),  # noqa: B008  # a NamedTuple is frozen
) -> Levels:
    """Images of the model's shape C, H, W as [N, C, H, W] of the type of the shards.

    images: an array or tensor [N, C, H, W] or [N, H, W, C], one image of it, [N, H, W] or [H, W] of one channel, nested lists, a PIL image
    or a list of PIL images or arrays. uint8 is taken as 0 to 255; real numbers must be in [0, 1], and are rounded to the nearest of the 256
    levels; other whole numbers must be from 0 to 255 and exceed 1 somewhere, unless all are 0; truth values are black and white.
    window: of the model; with another one than 8 bits, images are the stored values of its type. layout: the order of the axes, needed only where C = H = W. Raises UserError with the values for anything else.
    """
    if layout not in (None, "NCHW", "NHWC"):
        raise UserError(f"layout (={layout!r}) must be 'NCHW' or 'NHWC'")
    array = _array(images, image_shape[0], name, window)
    ordered, given = _ordered(array, image_shape, layout, name)
    values = _levels(ordered, name) if window == Window() else _stored(ordered, name, window)
    return Levels(np.require(values, requirements=["C", "W"]), given)


def in_layout(images: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Images [N, C, H, W] in an order of axes."""
    return images if layout == "NCHW" else np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def pictures(images: Any) -> list[Image.Image]:
    """PIL images from real numbers in [0, 1], clamped, or uint8, [N, C, H, W] or [N, H, W, C] with 1 or 3 channels.

    Raises UserError for another shape.
    """
    array = _numbers(images)
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise UserError(f"images have the shape {list(array.shape)}; give [N, C, H, W] with 1 or 3 channels")
    levels = array if array.dtype == np.uint8 else np.rint(255 * np.clip(array, 0, 1)).astype(np.uint8)
    return [Image.fromarray(level[..., 0] if level.shape[2] == 1 else level) for level in levels]


def _array(images: Any, channels: int, name: str, window: Window) -> NDArray[Any]:
    """The numbers of what was given, as one array."""
    if isinstance(images, Image.Image):
        return _of_picture(images, channels, name, window)[None]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not len(images):
            raise UserError(f"{name} is an empty list; give one image at least")
        each = [
            _of_picture(one, channels, name, window) if isinstance(one, Image.Image) else _numbers(one)
            for one in images
        ]
        shapes = sorted({one.shape for one in each})
        if len(shapes) > 1:
            several = " and ".join(str(list(shape)) for shape in shapes[:3])
            raise UserError(f"{name} have different shapes ({several}); give images of one size")
        return np.stack(each)
    return _numbers(images)


def _numbers(values: Any) -> NDArray[Any]:
    """An array, a tensor or nested lists as an array. Raises UserError for what holds no numbers."""
    if hasattr(values, "detach"):  # a tensor, without an import of torch
        tensor = values.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "buif":
        raise UserError(
            f"images are {type(values).__name__} of {array.dtype}; give arrays, tensors, PIL images or lists of them"
        )
    return array


def _of_picture(picture: Image.Image, channels: int, name: str, window: Window) -> NDArray[Any]:
    """A PIL image as [H, W, C]."""
    deep = {"uint16": ("I;16",), "float32": ("F",)}.get(window.dtype, ())
    if picture.mode in deep or (picture.mode == "RGBA" and channels == 4 and window.dtype == "uint8"):
        values = np.asarray(picture)
        return values[..., None] if values.ndim == 2 else values
    if window.dtype != "uint8":
        raise UserError(
            f"{name} are PIL images of mode {picture.mode}, and the model takes {window.text()}; give them as an array"
        )
    if picture.mode not in MODES:
        raise UserError(
            f"{name} are PIL images of mode {picture.mode}, whose colours have more than one reading; convert them first: "
            f"image.convert({'RGB' if channels == 3 else 'L'!r})"
        )
    upright = ImageOps.exif_transpose(picture)
    array = np.asarray(upright.convert(MODES[picture.mode]))
    try:
        return to_channels(array[..., None] if array.ndim == 2 else array, channels)
    except PictureFault:
        raise UserError(
            f"{name} are in colour, and the model takes one channel; convert them first: image.convert('L')"
        ) from None


def _ordered(
    array: NDArray[Any], image_shape: tuple[int, int, int], layout: Layout | None, name: str
) -> tuple[NDArray[Any], Layout]:
    """The array as [N, C, H, W], and the order that it had."""
    channels, height, width = image_shape
    shapes: dict[Layout, tuple[int, ...]] = {"NCHW": image_shape, "NHWC": (height, width, channels)}
    shape = array.shape
    if channels == 1 and shape[-2:] == (height, width) and array.ndim in (2, 3):
        return array.reshape(-1, 1, height, width), "NCHW"
    fitting = [one for one, axes in shapes.items() if shape[-3:] == axes and array.ndim in (3, 4)]
    if layout is not None:
        fitting = [one for one in fitting if one == layout]
    if not fitting:
        wanted = shapes[layout or "NCHW"]
        also = "" if layout else f" or [N, {', '.join(map(str, shapes['NHWC']))}]"
        raise UserError(
            f"{name} have the shape {list(shape)}; the model takes [N, {', '.join(map(str, wanted))}]{also}, so resize them first"
        )
    if len(fitting) > 1 and image_shape != (1, 1, 1):
        raise UserError(
            f"{name} of the shape {list(shape)} fit both orders of axes; give layout='NCHW' or 'NHWC'"
        )
    batch = array.reshape(-1, *shapes[fitting[0]])
    return (batch if fitting[0] == "NCHW" else batch.transpose(0, 3, 1, 2)), fitting[0]


def _stored(array: NDArray[Any], name: str, window: Window) -> NDArray[Any]:
    """Values as the shards of a window hold them. Raises UserError for others, and where more would be clipped than in training."""
    takes = f"the model takes {window.text()}"
    if array.dtype == np.bool_:
        raise UserError(f"{name} are truth values, and {takes}; give its stored values")
    lowest, highest = (float(array.min()), float(array.max())) if array.size else (window.low, window.low)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise UserError(f"{name} hold NaN or Inf, and {takes}")
    if window.levels is not None and array.dtype.kind == "f" and (array != np.rint(array)).any():
        raise UserError(
            f"{name} are real numbers from {lowest:g} to {highest:g}, and {takes}; give whole numbers, its stored values"
        )
    clipped = int(((array < window.low) | (array > window.high)).sum())
    if clipped > MOST_CLIPPED * array.size:
        raise UserError(
            f"{name} are from {lowest:g} to {highest:g}, and {takes}: {clipped:,} of {array.size:,} values would be clipped; give its "
            "stored values"
        )
    return array.clip(window.low, window.high).astype(window.dtype)


def _levels(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Values as levels from 0 to 255. Raises UserError for values that are none, or that have two meanings."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return np.where(array, 255, 0).astype(np.uint8)
    lowest, highest = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if array.dtype.kind == "f":
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise UserError(f"{name} hold NaN or Inf; give numbers in [0, 1]")
        if lowest < 0 or highest > 1:
            remedy = "give them as uint8, or divide them by 255" if lowest >= 0 else "scale them to [0, 1]"
            raise UserError(
                f"{name} are real numbers from {lowest:g} to {highest:g}, not in [0, 1]; {remedy}"
            )
        return np.rint(255 * array.astype(np.float64)).astype(np.uint8)
    if lowest < 0 or highest > 255:
        raise UserError(f"{name} are whole numbers from {lowest:g} to {highest:g}; give uint8 from 0 to 255")
    if highest == 1:
        raise UserError(
            f"{name} are {array.dtype} of 0 and 1, which may be two of 256 levels or black and white; give uint8, or real numbers "
            "in [0, 1]"
        )
    return array.astype(np.uint8)
