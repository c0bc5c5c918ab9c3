"""Random changes of training images: crops, turns, shifts and colours, each image's own, drawn by position.

They are drawn from (seed, step, slot) and applied in integer arithmetic by the process that reads, so that the pixels are the
same at every number of processes and on every device. Legend: B images of C channels, H rows, W columns.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import noise
from vaescale.data.config import AugmentConfig

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
PLACE_BITS = 11  # of a pixel's position between its neighbours
COLOUR_BITS = 14  # of a colour matrix
PADDINGS: dict[str, Literal["edge", "constant", "reflect"]] = {
    "edge": "edge",
    "zero": "constant",
    "reflect": "reflect",
}
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# RGB to luma and two axes of colour, as NTSC has them; the hue is the angle in their plane.
YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


class Changes(NamedTuple):
    """The changes of a batch, a row each; None: no such change.

    boxes: [B, 4], top, left, height and width of the crop as parts of the sides. turns: [B], by 90 degrees. shifts: [B, 2], rows
    down and columns right, and what they uncover. colours: [B, 4], factors of brightness, contrast and saturation, hue in turns.
    """

    boxes: Floats | None = None
    turns: Integers | None = None
    shifts: Integers | None = None
    padding: str = "edge"
    colours: Floats | None = None


def draw(config: AugmentConfig, stream: noise.Stream) -> Changes:
    """The changes of the images at a stream's slots.

    The area of a crop and the logarithm of its aspect are uniform; a side that would be longer than the image's is cut to it, and
    the place is uniform. Turns, shifts and the factors of colours are uniform.
    """
    u = noise.uniform(stream, noise.VIEW, (12,)).double().numpy()
    boxes = turns = shifts = colours = None
    if config.crop:
        (low, high), aspects = config.crop.scale, np.log(config.crop.aspect)
        area, aspect = low + u[:, 0] * (high - low), np.exp(aspects[0] + u[:, 1] * (aspects[1] - aspects[0]))
        size = np.minimum(np.sqrt(np.stack([area / aspect, area * aspect], 1)), 1)
        boxes = np.concatenate([u[:, 2:4] * (1 - size), size], 1)
    if config.turns:
        turns = (u[:, 4] * 4).astype(np.int64) if config.turns == "quarter" else 2 * (u[:, 4] < 0.5)
    if config.shift:
        shifts = (u[:, 5:7] * (2 * config.shift + 1)).astype(np.int64) - config.shift
    if jitter := config.jitter:
        largest = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
        colours = np.array([1.0, 1.0, 1.0, 0.0]) + (2 * u[:, 7:11] - 1) * largest
    return Changes(boxes, turns, shifts, config.padding, colours)


def changed(images: Tensor, changes: Changes, *, zero: float = 0) -> Tensor:
    """The images ([B, C, H, W]) cropped, then turned, then shifted, then with other colours.

    zero: the stored value that the model sees as 0. Colours are of uint8 alone.
    """
    x: NDArray[Any] = images.numpy()
    assert x.dtype == np.uint8 or changes.colours is None
    if changes.boxes is not None:
        x = _cropped(x, changes.boxes)
    if changes.turns is not None:
        x = x.copy()
        for turn in np.unique(changes.turns).tolist():
            x[changes.turns == turn] = np.rot90(x[changes.turns == turn], turn, axes=(2, 3))
    if changes.shifts is not None:
        x = _shifted(x, changes.shifts, changes.padding, zero)
    if changes.colours is not None:
        x = _coloured(x, changes.colours)
    return torch.from_numpy(np.ascontiguousarray(x))


def _cropped(x: NDArray[Any], boxes: Floats) -> NDArray[Any]:
    """Boxes of images, enlarged to the images' size by linear interpolation, rounded once, integers to the next one, halves upwards.

    Image by image: a gather over the batch takes three to five times as long.
    """
    wide_type = {np.dtype(np.uint8): np.int32, np.dtype(np.float32): np.float64}.get(x.dtype, np.int64)
    one, half = 1 << PLACE_BITS, 1 << (2 * PLACE_BITS - 1)
    (top, bottom, down), (left, right, across) = (
        _neighbours(start, part, size)
        for start, part, size in zip(boxes.T[:2], boxes.T[2:], x.shape[2:], strict=True)
    )
    cropped = np.empty_like(x)
    for number, image in enumerate(x.astype(wide_type)):
        weight = down[number, :, None]
        rows = image[:, top[number]] * (one - weight) + image[:, bottom[number]] * weight
        weight = across[number]
        wide = rows[..., left[number]] * (one - weight) + rows[..., right[number]] * weight
        cropped[number] = wide / one**2 if wide_type is np.float64 else (wide + half) >> (2 * PLACE_BITS)
    return cropped


def _neighbours(start: Floats, part: Floats, size: int) -> tuple[Integers, Integers, NDArray[np.int32]]:
    """For each pixel of a cropped side, the two pixels around its place and the weight of the second, [B, size] each."""
    places = start[:, None] * size + (np.arange(size) + 0.5) * part[:, None] - 0.5
    fixed = np.floor(np.clip(places, 0, size - 1) * (1 << PLACE_BITS) + 0.5).astype(np.int64)
    first = fixed >> PLACE_BITS
    weight = (fixed & ((1 << PLACE_BITS) - 1)).astype(np.int32)
    return first, np.minimum(first + 1, size - 1), weight


def _shifted(x: NDArray[Any], by: Integers, padding: str, zero: float) -> NDArray[Any]:
    """Images moved down and to the right by whole pixels, each by its own numbers."""
    most, (height, width) = int(np.abs(by).max()), x.shape[2:]
    constant: Any = {"constant_values": x.dtype.type(zero)} if padding == "zero" else {}
    padded = np.pad(x, ((0, 0), (0, 0), (most, most), (most, most)), mode=PADDINGS[padding], **constant)
    shifted = np.empty_like(x)
    for number, (top, left) in enumerate((most - by).tolist()):
        shifted[number] = padded[number, :, top : top + height, left : left + width]
    return shifted


def _coloured(x: NDArray[np.uint8], colours: Floats) -> NDArray[np.uint8]:
    """Images with other colours: one affine map of each image's channels, rounded once, halves upwards, and cut to 0 to 255.

    With brightness b, contrast c, saturation s, the rotation R of the hue, the grey w^T x of a pixel and the mean grey m of the
    image, x -> c b (s R + (1 - s) 1 w^T) x + (1 - c) b m. Nothing is cut between the four, so their order does not matter.
    """
    channels = x.shape[1]
    brightness, contrast, saturation, hue = colours.T
    grey = LUMA if channels == 3 else np.full(channels, 1 / channels)
    mean = x.sum((2, 3), dtype=np.int64) / (x.shape[2] * x.shape[3]) @ grey
    matrix = np.broadcast_to(np.eye(channels), (len(x), channels, channels))
    if channels == 3:
        cos, sin = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
        turn = np.zeros((len(x), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
        rotation = np.linalg.inv(YIQ) @ turn @ YIQ
        to_grey = np.ones((3, 1)) * LUMA
        matrix = saturation[:, None, None] * rotation + (1 - saturation)[:, None, None] * to_grey
    matrix = np.rint((contrast * brightness)[:, None, None] * matrix * (1 << COLOUR_BITS)).astype(np.int32)
    offset = np.rint((1 - contrast) * brightness * mean * (1 << COLOUR_BITS)).astype(np.int32)
    wide = x.astype(np.int32)
    mapped = np.broadcast_to((offset + (1 << (COLOUR_BITS - 1)))[:, None, None, None], x.shape).copy()
    for channel in range(channels):
        mapped += matrix[:, :, channel, None, None] * wide[:, None, channel]
    coloured: NDArray[np.uint8] = np.clip(mapped >> COLOUR_BITS, 0, 255).astype(np.uint8)
    return coloured
