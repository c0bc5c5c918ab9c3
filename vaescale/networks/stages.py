"""The compact notation for a ladder's blocks, and a default ladder for an image size.

    encoder   32x11   11 blocks at 32x32           32d2   a block at 32x32 that pools to 16x16
    decoder   32x21   21 groups at 32x32           32m16  a group at 32x32 to which the 16x16 map is unpooled

As in the configurations of Child 2021.
"""

import itertools
import re
from typing import NamedTuple

SIGNS = {"x": "COUNT", "d": "FACTOR", "m": "SMALLER"}


class Block(NamedTuple):
    """A block at a resolution. It pools by the factor `pools` after it (encoder), or unpools the map at `mixes` before it."""

    resolution: int
    pools: int = 1
    mixes: int | None = None


def parse_encoder(stages: tuple[str, ...], *, image_size: int) -> tuple[Block, ...]:
    """Parse the encoder's blocks, from the image down. Raises ValueError when two consecutive stages do not fit."""
    blocks, current = [], image_size
    for stage in stages:
        resolution, sign, number = _parse(stage, "xd")
        if resolution != current:
            raise ValueError(
                f"{stage!r} is given where the map is {current}x{current}; write {current}{sign}{number}"
            )
        if sign == "d":
            if number < 2 or current % number:
                factors = " or ".join(
                    str(factor) for factor in range(2, current + 1) if current % factor == 0
                )
                raise ValueError(f"{stage!r} does not pool {current}x{current}; pool it by {factors}")
            blocks.append(Block(current, pools=number))
            current //= number
        else:
            blocks += [Block(current)] * number
    return tuple(blocks)


def parse_decoder(stages: tuple[str, ...], *, image_size: int, resolutions: set[int]) -> tuple[Block, ...]:
    """Parse the decoder's groups, from the encoder's smallest map up to the image.

    Each map is unpooled into the next larger one, so every block and group affects the image. Raises ValueError when two
    consecutive stages do not fit.
    """
    blocks: list[Block] = []
    current = 0
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
            raise ValueError(f"{stage!r} does not unpool {current}x{current}, which comes before it; {what}")
        if sign == "x" and current and resolution != current:
            raise ValueError(
                f"{stage!r} follows {current}x{current}; write {resolution}m{current} before it, or {current}x{number}"
            )
        blocks += [Block(resolution, mixes=number)] if sign == "m" else [Block(resolution)] * number
        current = resolution
    if current != image_size:
        raise ValueError(
            f"it ends at {current}x{current}; end it with a group at {image_size}, the image's size"
        )
    return tuple(blocks)


def suggested(image_size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The default encoder and decoder for an image size: halved while it is even and above 4, then pooled to one pixel."""
    sizes = [image_size]
    while sizes[-1] > 4 and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    if sizes[-1] > 1:
        sizes.append(1)
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
    return (*down, "1x1"), ("1x1", *up)


def _parse(word: str, signs: str) -> tuple[int, str, int]:
    match = re.fullmatch(rf"([1-9]\d{{0,4}})(?:([{signs}])([1-9]\d{{0,4}}))?", word)
    if match is None:
        examples = " or ".join(f"RESOLUTION{sign}{what}" for sign, what in SIGNS.items() if sign in signs)
        raise ValueError(
            f"{word!r} is not a stage; write {examples} with numbers from 1, such as 32{signs[1]}2"
        )
    return int(match[1]), match[2] or "x", int(match[3] or 1)
