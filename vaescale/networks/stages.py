"""The compact words for a ladder's blocks, and the ladder that an image size suggests.

    encoder   32x11   11 blocks at 32x32           32d2   a block at 32x32 that pools to 16x16
    decoder   32x21   21 groups at 32x32           32m16  a group at 32x32 to which the 16x16 map is unpooled

As in the configurations of Child 2021.
"""

import itertools
import re
from typing import NamedTuple

SIGNS = {"x": "COUNT", "d": "FACTOR", "m": "SMALLER"}


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
            raise ValueError(f"{word!r} is given where the map is {here}x{here}; write {here}{sign}{number}")
        if sign == "d":
            if number < 2 or here % number:
                factors = " or ".join(str(factor) for factor in range(2, here + 1) if here % factor == 0)
                raise ValueError(f"{word!r} does not pool {here}x{here}; pool it by {factors}")
            blocks.append(Block(here, pools=number))
            here //= number
        else:
            blocks += [Block(here)] * number
    return tuple(blocks)


def parse_decoder(words: tuple[str, ...], *, image_size: int, resolutions: set[int]) -> tuple[Block, ...]:
    """Groups from the encoder's smallest map up to the image, each map taken in by the next larger one: then every block
    and group has a part in the image. Raises ValueError when they do not follow from one another.
    """
    blocks: list[Block] = []
    here = 0
    for word in words:
        resolution, sign, number = _parse(word, "xm")
        if resolution not in resolutions:
            raise ValueError(f"{word!r} is at no resolution of the encoder; it has {sorted(resolutions)}")
        if not here and (resolution != min(resolutions) or sign == "m"):
            raise ValueError(
                f"it begins with {word!r}; begin with {min(resolutions)}x{number}, the encoder's smallest map"
            )
        if sign == "m" and (number != here or resolution <= here or resolution % here):
            fits = [f"{size}m{here}" for size in sorted(resolutions) if size > here and size % here == 0]
            what = f"write {' or '.join(fits)}" if fits else "end there"
            raise ValueError(f"{word!r} does not take in {here}x{here}, which comes before it; {what}")
        if sign == "x" and here and resolution != here:
            raise ValueError(
                f"{word!r} follows {here}x{here}; write {resolution}m{here} before it, or {here}x{number}"
            )
        blocks += [Block(resolution, mixes=number)] if sign == "m" else [Block(resolution)] * number
        here = resolution
    if here != image_size:
        raise ValueError(f"it ends at {here}x{here}; let its last group be at {image_size}, the image's size")
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
        examples = " or ".join(f"RESOLUTION{sign}{what}" for sign, what in SIGNS.items() if sign in signs)
        raise ValueError(f"{word!r} is no stage; write {examples}, both from 1, such as 32{signs[1]}2")
    return int(match[1]), match[2] or "x", int(match[3] or 1)
