"""The compact words for a ladder's blocks, and the ladder that an image size suggests.

    encoder   32x11   11 blocks at 32x32           32d2   a block at 32x32 that pools to 16x16
    decoder   32x21   21 groups at 32x32           32m16  a group at 32x32 to which the 16x16 map is unpooled

As in the configurations of Child 2021.
"""

import itertools
import re
from typing import NamedTuple


class Block(NamedTuple):
    """A block at a resolution: `pools` by a factor after it (encoder), or unpools the map at `mixes` before it."""

    resolution: int
    pools: int = 1
    mixes: int | None = None


def parse_encoder(words: tuple[str, ...], *, image_size: int) -> tuple[Block, ...]:
    """Blocks from the image down. Raises ValueError when they do not follow from one another."""
    blocks, here = [], image_size
    for word in words:
        resolution, sign, number = _parse(word, "xd")
        if resolution != here:
            raise ValueError(f"{word!r} stands where the map is {here}x{here}; write {here}{sign}{number}")
        if sign == "d":
            if number < 2 or here % number:
                factors = [factor for factor in range(2, here + 1) if here % factor == 0]
                raise ValueError(f"{word!r} does not pool {here}x{here}; pool it by one of {factors}")
            blocks.append(Block(here, pools=number))
            here //= number
        else:
            blocks += [Block(here)] * number
    return tuple(blocks)


def parse_decoder(words: tuple[str, ...], *, image_size: int, resolutions: set[int]) -> tuple[Block, ...]:
    """Groups from the smallest map up to the image. Raises ValueError when they do not follow from one another, or stand
    at a resolution that the encoder does not have.
    """
    blocks: list[Block] = []
    seen: set[int] = set()
    for word in words:
        resolution, sign, number = _parse(word, "xm")
        if resolution not in resolutions:
            raise ValueError(f"{word!r} is at no resolution of the encoder; it has {sorted(resolutions)}")
        if sign == "m":
            if number not in seen or resolution % number or resolution == number:
                below = [size for size in sorted(seen) if resolution % size == 0 and size < resolution]
                raise ValueError(f"{word!r} mixes in no smaller map that it follows; it follows {below}")
            blocks.append(Block(resolution, mixes=number))
        else:
            if seen and resolution not in seen:
                raise ValueError(
                    f"{word!r} begins at a new resolution; write {resolution}m{max(seen)} before it"
                )
            blocks += [Block(resolution)] * number
        seen.add(resolution)
    if image_size not in seen:
        raise ValueError(
            f"it ends at {max(seen, default=0)}; let its last group be at {image_size}, the image's size"
        )
    return tuple(blocks)


def suggested(image_size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Encoder and decoder words for an image size: halved while that is even and above 4, then pooled to one pixel."""
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
        raise ValueError(f"{word!r} is none of {', '.join(f'32{sign}2' for sign in signs)}")
    return int(match[1]), match[2] or "x", int(match[3] or 1)
