"""The compact notation for a ladder's blocks, and a default ladder for an image size. A resolution is the height of its maps.

    encoder   32x11   11 blocks at 32x32           32d2   a block at 32x32 that pools to 16x16
    decoder   32x21   21 groups at 32x32           32m16  a group at 32x32 to which the 16x16 map is unpooled

As in the configurations of Child 2021. Images of 48x96 have maps of 24x48 at resolution 24.
"""

import itertools
import math
import re
from typing import NamedTuple

SIGNS = {"x": "COUNT", "d": "FACTOR", "m": "SMALLER"}


class Block(NamedTuple):
    """A block of maps of a height, the resolution, and a width. It pools by the factor `pools` after it (encoder), or unpools the map at
    resolution `mixes` before it.
    """

    resolution: int
    width: int
    pools: int = 1
    mixes: int | None = None


def parse_encoder(stages: tuple[str, ...], *, image_size: tuple[int, int]) -> tuple[Block, ...]:
    """Parse the encoder's blocks, from the image down. Raises ValueError when two consecutive stages do not fit."""
    blocks, (current, width) = [], image_size
    for stage in stages:
        resolution, sign, number = _parse(stage, "xd")
        if resolution != current:
            raise ValueError(
                f"{stage!r} is given where the map is {current}x{width}; write {current}{sign}{number}"
            )
        if sign == "d":
            common = math.gcd(current, width)
            if number < 2 or common % number:
                factors = [str(factor) for factor in range(2, common + 1) if common % factor == 0]
                what = f"pool it by {' or '.join(factors)}" if factors else "end there"
                raise ValueError(f"{stage!r} does not pool {current}x{width}; {what}")
            blocks.append(Block(current, width, pools=number))
            current, width = current // number, width // number
        else:
            blocks += [Block(current, width)] * number
    return tuple(blocks)


def parse_decoder(
    stages: tuple[str, ...], *, image_size: tuple[int, int], resolutions: set[int]
) -> tuple[Block, ...]:
    """Parse the decoder's groups, from the encoder's smallest map up to the image.

    Each map is unpooled into the next larger one, so every block and group affects the image. Raises ValueError when two
    consecutive stages do not fit.
    """
    blocks: list[Block] = []
    current, (height, width) = 0, image_size
    for stage in stages:
        resolution, sign, number = _parse(stage, "xm")
        if resolution not in resolutions:
            raise ValueError(
                f"{stage!r} is at a resolution that the encoder does not have; it has {sorted(resolutions)}"
            )
        if not current and (resolution != min(resolutions) or sign == "m"):
            raise ValueError(
                f"it begins with {stage!r}; begin with {min(resolutions)}x{number}, the encoder's smallest map"
            )
        if sign == "m" and (number != current or resolution <= current or resolution % current):
            fits = [
                f"{size}m{current}" for size in sorted(resolutions) if size > current and size % current == 0
            ]
            what = f"write {' or '.join(fits)}" if fits else "end there"
            raise ValueError(
                f"{stage!r} does not unpool {current}x{current * width // height}, which comes before it; {what}"
            )
        if sign == "x" and current and resolution != current:
            raise ValueError(
                f"{stage!r} follows {current}x{current * width // height}; write {resolution}m{current} before it, or {current}x{number}"
            )
        columns = resolution * width // height
        blocks += (
            [Block(resolution, columns, mixes=number)]
            if sign == "m"
            else [Block(resolution, columns)] * number
        )
        current = resolution
    if current != height:
        raise ValueError(
            f"it ends at {current}x{current * width // height}; end it with a group at {height}, the image's"
        )
    return tuple(blocks)


def suggested(image_size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The default encoder and decoder for images of H x W: halved while H and W are even and the smaller one is above 4, then pooled by
    their greatest common divisor, a square to one pixel.
    """
    (height, width), sizes = image_size, [image_size[0]]
    while min(height, width) > 4 and height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
        sizes.append(height)
    if (common := math.gcd(height, width)) > 1:
        sizes.append(height // common)
    down = [
        word
        for size, smaller in itertools.pairwise(sizes)
        for word in (f"{size}x2", f"{size}d{size // smaller}")
    ]
    up = [
        word
        for size, smaller in zip(sizes[-2::-1], sizes[:0:-1], strict=True)
        for word in (f"{size}m{smaller}", f"{size}x2")
    ]
    return (*down, f"{sizes[-1]}x1"), (f"{sizes[-1]}x1", *up)


def _parse(word: str, signs: str) -> tuple[int, str, int]:
    match = re.fullmatch(rf"([1-9]\d{{0,4}})(?:([{signs}])([1-9]\d{{0,4}}))?", word)
    if match is None:
        examples = " or ".join(f"RESOLUTION{sign}{what}" for sign, what in SIGNS.items() if sign in signs)
        raise ValueError(
            f"{word!r} is not a stage; write {examples} with numbers from 1, such as 32{signs[1]}2"
        )
    return int(match[1]), match[2] or "x", int(match[3] or 1)
