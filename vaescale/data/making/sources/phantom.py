"""`phantom`: slices of a synthetic chest in Hounsfield units, int16, as computed tomography stores them.

Each sample has a JSON member whose `shape` is the chest's [half width, half height, turn], in half image sides and radians.
No patient's data: ellipses of air, fat, muscle, lung, bone and vessels with random places, sizes and densities, and the noise of a
scanner. Hounsfield units are 0 for water and -1000 for air (Hounsfield 1973). Made for trying 16-bit images, not for medicine.
"""

import json
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vaescale.config import Dtype
from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split
from vaescale.errors import UserError

SIDE, FINER = 32, 4  # pixels, and points along each side of a pixel, which are averaged
NUMBERS = {"train": 2000, "val": 250}
SEEDS = {"train": 0, "val": 1}
AIR, FAT, MUSCLE, LUNG, BONE, VESSEL = -1000.0, -100.0, 50.0, -800.0, 900.0, 180.0
NOISE = 12.0  # Hounsfield units
LEAST, MOST = -1024, 3071  # the 12 bits of a scanner
_AXIS = (np.arange(SIDE * FINER) + 0.5) / (SIDE * FINER) * 2 - 1
_X, _Y = _AXIS[None], _AXIS[:, None]


def phantom(*, dtype: Dtype = "int16") -> Source:
    """2,000 images for train and 250 for val, 32x32, int16, without classes: give --dtype int16.

    Image n of a split depends on the split and n alone, whichever images are made beside it. Raises UserError for another dtype.
    """
    if dtype != "int16":
        raise UserError(
            f"--dtype (={dtype}) must be int16 for phantom, which has values from {LEAST} to {MOST}"
        )
    return Source({split: partial(_split, split) for split in NUMBERS})


def image(split: str, number: int) -> NDArray[np.int16]:
    """Image `number` of a split, [32, 32, 1] in Hounsfield units."""
    return drawn(split, number)[0]


def drawn(split: str, number: int) -> tuple[NDArray[np.int16], tuple[float, float, float]]:
    """Image `number` of a split, [32, 32, 1] in Hounsfield units, and the chest's half width, half height and turn."""
    generator = np.random.Generator(np.random.Philox(key=[SEEDS[split], number]))

    def between(low: float, high: float) -> float:
        return float(generator.uniform(low, high))

    width, height, turn = between(0.7, 0.92), between(0.5, 0.68), between(-0.12, 0.12)
    x, y = _X * np.cos(turn) + _Y * np.sin(turn), _Y * np.cos(turn) - _X * np.sin(turn)
    slice_ = np.full((SIDE * FINER,) * 2, AIR)

    def draw(centre: tuple[float, float], radii: tuple[float, float], density: float) -> None:
        inside = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1
        slice_[inside] = density

    draw((0, 0), (width, height), FAT + between(-20, 20))
    wall = between(0.86, 0.95)
    draw((0, 0), (width * wall, height * wall), MUSCLE + between(-15, 15))
    lung, air = between(0.26, 0.34), LUNG + between(-80, 80)
    for side in (-1, 1):
        centre = (side * width * between(0.46, 0.52), between(-0.08, 0.04))
        draw(centre, (width * lung, height * between(0.6, 0.74)), air)
        for _ in range(int(generator.integers(3, 8))):
            angle, reach, size = between(0, 2 * np.pi), between(0, 0.7), between(0.015, 0.035)
            place = (
                centre[0] + reach * width * lung * np.cos(angle),
                centre[1] + reach * height * 0.6 * np.sin(angle),
            )
            draw(place, (size, size), VESSEL + between(-80, 80))
    draw((between(-0.08, 0.12), between(-0.06, 0.06)), (between(0.18, 0.26), between(0.16, 0.24)), 40.0)
    draw((between(-0.12, 0.02), 0.24 * height), (0.07, 0.07), VESSEL + between(-60, 120))
    draw((0, 0.68 * height), (between(0.12, 0.16), 0.13), BONE + between(-300, 500))
    draw((0, 0.68 * height), (0.05, 0.05), 20.0)
    for rib in np.linspace(0.15, 0.85, 6) * np.pi:
        for side in (-1, 1):
            place = (side * width * 0.87 * np.sin(rib), height * 0.87 * np.cos(rib))
            draw(place, (0.035, 0.03), BONE + between(-200, 400))
    pixels = slice_.reshape(SIDE, FINER, SIDE, FINER).mean((1, 3)) + NOISE * generator.normal(
        size=(SIDE, SIDE)
    )
    rounded: NDArray[np.int16] = np.rint(pixels).clip(LEAST, MOST).astype(np.int16)
    return rounded[:, :, None], (width, height, turn)


def _split(split: str) -> Split:
    number = NUMBERS[split]

    def items() -> Iterator[Item]:
        for n in range(number):
            pixels, shape = drawn(split, n)
            yield Item(f"{n:06d}", pixels, -1, (("json", json.dumps({"shape": shape}).encode()),))

    def outline() -> Iterator[Item]:
        blank = np.broadcast_to(np.int16(0), (SIDE, SIDE, 1))
        return (Item(f"{n:06d}", blank, -1) for n in range(number))

    return Split(items(), number, outline=outline)
