"""Images in arrays: which axis is which, which values are black and white, and the split that they make.

Axes: N images, H rows, W columns, C channels, as in `NHWC`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from vaescale.config import Dtype
from vaescale.data.making.items import Item, members_of
from vaescale.data.making.sources.base import Split
from vaescale.data.making.sources.stored import Array, Stored
from vaescale.data.pictures.header import MAX_PIXELS, MOST_CHANNELS
from vaescale.errors import DataError, UserError

LAYOUTS = {3: ("NHW", "HWN"), 4: ("NHWC", "NCHW", "HWCN")}
CHANNELS = (1, 3)  # of arrays whose shape tells the channels; others only where no axis has one of these
MORE_CHANNELS = tuple(range(1, MOST_CHANNELS + 1))
PROBED_IMAGES = 1000
MOST_ELONGATED = 8
_SHAPES = f"images must be [N, H, W], [N, H, W, C] or [N, C, H, W], with C 1 or 3, or at most {MOST_CHANNELS}"
_RANGE = (
    "choose the values of black and white, LOW and HIGH, and save 8-bit images with numpy.save('images.npy', "
    "((images - LOW) * 255.0 / (HIGH - LOW)).round().clip(0, 255).astype('uint8'))"
)


class Images(NamedTuple):
    """Images in an array. axis: N of the stored array. shape: H, W, C. upright: a stored block to [N, H, W, C]."""

    stored: Stored
    axis: int
    shape: tuple[int, int, int]
    upright: Callable[[Array], Array]

    @property
    def number(self) -> int:
        """The number of images."""
        return self.stored.shape[self.axis]

    def blocks(self) -> Iterator[Array]:
        """Yield the images in blocks [N, H, W, C] of the stored element type."""
        return map(self.upright, self.stored.blocks(self.axis))


class Part(NamedTuple):
    """Images of a split in one array, their classes (-1: none), and their vectors float32 [N, V], NaN for none."""

    images: Images
    labels: Sequence[int] | NDArray[np.int64]
    vectors: NDArray[np.float32] | None = None


def array_split(parts: Sequence[Part], class_names: tuple[str, ...], scale: "Scale") -> Split:
    """The split of the images of several arrays, in their order. The images are read when the items are."""

    def items() -> Iterator[Item]:
        number = 0
        for images, labels, vectors in parts:
            start = number
            for block in images.blocks():
                for image in to_bytes(block, scale, images.stored.name, number - start):
                    row = number - start
                    yield Item(f"{number:06d}", image, int(labels[row]), members_of(vectors, row))
                    number += 1

    def outline() -> Iterator[Item]:
        number = 0
        for images, labels, _ in parts:
            blank = np.broadcast_to(
                np.zeros((), images.stored.dtype if scale is RAW else np.uint8), images.shape
            )
            for label in labels:
                yield Item(f"{number:06d}", blank, int(label))
                number += 1

    return Split(items(), sum(part.images.number for part in parts), class_names, outline=outline)


def as_images(
    stored: Stored,
    key: str,
    *,
    axes: str | None = None,
    labels: int | None = None,
    matlab: bool = False,
    dtype: Dtype = "uint8",
) -> Images:
    """The images in an array. axes: their layout, such as NHWC; None: the one that the shape tells.

    key: what --column calls the array. labels: how many labels belong to the images. matlab: the array has MATLAB's habit of [H, W, N]. Raises DataError for an
    array that holds no images, or whose shape allows several layouts, and UserError for axes that do not fit.
    """
    if stored.dtype.kind not in "buif" or (stored.dtype.kind == "f" and stored.dtype.itemsize > 8):
        raise DataError(f"{stored.name} is {stored.described()}; images must be uint8, bool or float")
    if dtype != "uint8" and stored.dtype.newbyteorder("=") != dtype:
        raise DataError(
            f"{stored.name} is {stored.described()}, not {dtype}; give its type as --dtype, or save it as {dtype}"
        )
    is_deep = stored.dtype.kind in "iu" and stored.dtype != np.uint8
    if dtype == "uint8" and is_deep and len(stored.shape) in LAYOUTS:
        keep = (
            f"keep its values with --dtype {stored.dtype.name}, or "
            if stored.dtype.name in get_args(Dtype)
            else ""
        )
        raise DataError(f"{stored.name} is {stored.described()}, not 8-bit; {keep}{_RANGE}")
    if axes is None:
        axes = _layout(stored, key, labels, matlab=matlab)
    elif "".join(sorted(axes)) not in ("HNW", "CHNW") or len(axes) != len(stored.shape):
        raise UserError(
            f"--column image={key}:{axes} must name the axes of {stored.name}, {list(stored.shape)}, such as "
            f"{LAYOUTS.get(len(stored.shape), ('NHWC',))[0]}"
        )
    sizes = {"C": 1, **dict(zip(axes, stored.shape, strict=True))}
    if sizes["C"] not in MORE_CHANNELS:
        raise DataError(f"{stored.name} has {sizes['C']} channels as {axes}; {_SHAPES}: save a part of it")
    if not 0 < sizes["H"] * sizes["W"] <= MAX_PIXELS:
        raise DataError(
            f"{stored.name} has images of {sizes['H']}x{sizes['W']} pixels; from 1 to {MAX_PIXELS} pixels are read"
        )
    order = [axes.index(axis) for axis in "NHWC" if axis in axes]

    def upright(block: Array) -> Array:
        block = block.transpose(order)
        return block if "C" in axes else block[..., None]

    return Images(stored, axes.index("N"), (sizes["H"], sizes["W"], sizes["C"]), upright)


def flat_images(stored: Stored, *, lead: int = 0) -> Images:
    """Square colour images in rows [N, lead + 3*S*S], red, green and blue after each other. lead: columns before the image."""
    width = stored.shape[1] - lead if len(stored.shape) == 2 else 0
    side = math.isqrt(max(0, width) // 3)
    if not side or width != 3 * side * side or stored.dtype != np.uint8:
        raise DataError(
            f"{stored.name} is {stored.described()}, not uint8 [N, 3*S*S] for images of SxS pixels"
        )

    def upright(block: Array) -> Array:
        return block[:, lead:].reshape(-1, 3, side, side).transpose(0, 2, 3, 1)

    return Images(stored, 0, (side, side, 3), upright)


def may_be_images(stored: Stored, dtype: Dtype = "uint8") -> bool:
    """Whether the element type and shape are those of images. dtype: the type that is wanted."""
    kinds = stored.dtype == np.uint8 or stored.dtype.kind in "bf"
    if dtype != "uint8":
        kinds = stored.dtype.newbyteorder("=") == dtype
    return kinds and len(stored.shape) in LAYOUTS and bool(_possible(stored.shape))


def _possible(shape: tuple[int, ...]) -> list[str]:
    layouts = LAYOUTS.get(len(shape), ())
    usual, more = (
        [each for each in layouts if "C" not in each or shape[each.index("C")] in channels]
        for channels in (CHANNELS, MORE_CHANNELS)
    )
    return usual or more


def _layout(stored: Stored, key: str, labels: int | None, *, matlab: bool) -> str:
    """The layout that an array's shape tells. Raises DataError if it tells none or several."""
    shape = stored.shape
    possible = _possible(shape)
    if not possible:
        remedy = "save the part of it that is images with numpy.save"
        if len(shape) == 2:
            remedy = "reshape it with numpy.save('images.npy', images.reshape(-1, CHANNELS, HEIGHT, WIDTH))"
        raise DataError(f"{stored.name} has the shape {list(shape)}; {_SHAPES}: {remedy}")
    if labels is not None and len(fitting := [each for each in possible if shape[each.index("N")] == labels]):
        possible = fitting
    elif len(shape) == 3:
        possible = _usual(shape, matlab=matlab)
    if len(possible) > 1:
        raise DataError(
            f"{stored.name} has the shape {list(shape)}, which may be {' or '.join(possible)}; choose with --column "
            f"image={key}:{possible[0]}"
        )
    return possible[0]


def _usual(shape: tuple[int, ...], *, matlab: bool) -> list[str]:
    """The layouts of an array of three axes without labels: [N, H, W], unless it looks like [H, W, N] or one image [H, W, C]."""
    number, height, width = shape
    elongated = max(height, width) > MOST_ELONGATED * max(1, min(height, width))
    alike = height == width and number != height
    return ["NHW"] if alike or not (matlab or elongated or number == height) else ["NHW", "HWN"]


class Scale(NamedTuple):
    """How values become 0 to 255: value * factor + shift. meaning: for messages."""

    factor: float
    shift: float
    meaning: str


BYTES = Scale(1, 0, "whole numbers from 0 to 255")
UNIT = Scale(255, 0, "from 0 to 1, in steps of 1/255")
BINARY = Scale(255, 0, "0 and 1")
RAW = Scale(1, 0, "of the type that was asked for")  # kept as they are
SIGNED = Scale(127.5, 127.5, "from -1 to 1, in steps of 2/255")
# The largest distance from a whole number after scaling, by the size of the element in bytes.
_TOLERANCES = {2: 0.07, 4: 1e-3, 8: 1e-3}


def find_scale(images: Sequence[Images]) -> Scale:
    """How the values of the first images become 0 to 255. Raises DataError for floats that are not multiples of a step.

    The first images with a value other than 0 decide; `to_bytes` checks that all others agree.
    """
    for each in images:
        seen = 0
        candidates = [BINARY, BYTES, UNIT, SIGNED]
        something = False
        for block in each.blocks():
            candidates = [scale for scale in candidates if _scaled(block, scale) is not None]
            if not candidates:
                _refuse_not_finite(block, each.stored.name, seen)
                low, high = float(block.min()), float(block.max())
                raise DataError(
                    f"{each.stored.name} holds {block.dtype} values from {low:.4g} to {high:.4g}, which do not tell what "
                    f"is black and what is white; {_RANGE}"
                )
            something = something or bool(block.any())
            seen += len(block)
            if something and (seen >= PROBED_IMAGES or len(candidates) == 1):
                return candidates[0]
        if something:
            return candidates[0]
    return BYTES


def to_bytes(block: Array, scale: Scale, name: str, first: int) -> Any:
    """A block [N, H, W, C] as uint8, or as it is with RAW, contiguous. name, first: of the array and the first image, for messages.

    Raises DataError for values that contradict the scale.
    """
    if scale is RAW:
        _refuse_not_finite(block, name, first)
        return np.ascontiguousarray(block.astype(block.dtype.newbyteorder("="), copy=False))
    scaled = _scaled(block, scale)
    if scaled is None:
        _refuse_not_finite(block, name, first)
        strange = next(n for n, image in enumerate(block) if _scaled(image, scale) is None)
        low, high = float(block[strange].min()), float(block[strange].max())
        raise DataError(
            f"{name}: image {first + strange} holds values from {low:.4g} to {high:.4g}, those before it "
            f"{scale.meaning}; {_RANGE}"
        )
    return np.ascontiguousarray(scaled)


def _refuse_not_finite(block: Array, name: str, first: int) -> None:
    """Raise DataError where values of a block [N, H, W, C] are NaN or infinite. name, first: of the array and the first image."""
    strange = ~np.isfinite(block)
    if strange.any():
        images = np.flatnonzero(strange.any(axis=(1, 2, 3)))
        raise DataError(
            f"{name}: image {first + images[0]} holds NaN or infinite values ({strange[images[0]].sum()}); save the images without such ones, "
            "or give them a value with numpy.nan_to_num"
        )


def _scaled(block: Array, scale: Scale) -> NDArray[np.uint8] | None:
    """The block as uint8, or None if its values contradict the scale."""
    if block.dtype.kind in "bui":
        if scale is BYTES and block.dtype == np.uint8:
            return block
        most = {BYTES: 255, BINARY: 1}.get(scale, -1)
        if block.min(initial=0) < 0 or block.max(initial=0) > most:
            return None
        return block.astype(np.uint8) * np.uint8(scale.factor)
    if scale is BINARY and not ((block == 0) | (block == 1)).all():
        return None
    wide: NDArray[np.float32 | np.float64] = block.astype(
        np.float32 if block.dtype.itemsize < 8 else np.float64, copy=False
    )
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are close to no whole number
        scaled = wide * scale.factor + scale.shift
        rounded = np.rint(scaled)
        distance = np.abs(scaled - rounded)
    least, most = rounded.min(initial=0), rounded.max(initial=0)
    close = bool((distance <= _TOLERANCES[block.dtype.itemsize]).all())
    return rounded.astype(np.uint8) if close and least >= 0 and most <= 255 else None
