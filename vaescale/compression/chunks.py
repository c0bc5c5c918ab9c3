"""A chunk: images that share one stack of bits, and can be decoded without the other chunks of a file.

The first images choose their latents from initial words, which are left at the bottom of the stack when all is decoded: those that a known
generator makes or, where many are needed, the chunk's first images packed by zlib (another codec begins in Townsend et al. 2020, too). A batch holds as many images as the bits on the stack suffice for: one image at first, and soon all that fit.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import noise
from vaescale.compression.ans import WORD_BITS, Stack, Words
from vaescale.compression.bits_back import Codec, Condition, Grids, Lengths
from vaescale.errors import DataError

SPARE_WORDS = 4
MOST_EMPTY_WORDS = 256  # of initial words without images
CHECK_BYTES, CHECK_SHARE = 4, 0.002
"""The checksums of a chunk may take this share of its code; a checksum is then of several small images."""
Levels = NDArray[np.uint8]


class Coding(NamedTuple):
    """The code of a chunk's images: the words, the sizes of its batches, the phases of its images, a crc32 for each `group` of them.

    initial_words: their number. lengths: of the images; None in a chunk that was read. first_images: number of images that are the
    initial words, and not in `batches`, `grids` and `lengths`.
    """

    words: Words
    batches: tuple[int, ...]
    grids: Grids
    group: int
    checks: tuple[int, ...]
    initial_words: int
    lengths: Lengths | None = None
    first_images: int = 0

    @property
    def images(self) -> int:
        """The number of images."""
        return self.first_images + sum(self.batches)


def encode_chunk(
    codec: Codec,
    levels: Levels,
    *,
    condition: Condition | None = None,
    group: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Coding:
    """Code images uint8 [N, C, H, W]. condition: that a model with one needs. group: number of images of a checksum;
    None: so that they take 0.2% of the code at most.

    progress: called with the number of images of each batch that is done.
    """
    need = max(1, codec.taken_bits)
    first, initial = _beginning(levels, -(-need // WORD_BITS) + SPARE_WORDS, codec.pixels.levels)
    stack = Stack(initial)
    batches, grids, lengths = list[int](), list[Grids](), list[Lengths]()
    while (done := first + sum(batches)) < len(levels):
        size = min(codec.batch, len(levels) - done, max(1, (stack.bits - SPARE_WORDS * WORD_BITS) // need))
        rows = slice(done, done + size)
        coded, of_images = codec.encode(
            stack, levels[rows].astype(np.int64), None if condition is None else condition[rows]
        )
        batches.append(size)
        grids.append(coded)
        lengths.append(of_images)
        if progress is not None:
            progress(size)
    words = stack.words()
    if group is None:
        group = min(
            len(levels), max(1, round(CHECK_BYTES * len(levels) / (CHECK_SHARE * words.nbytes + 1e-9)))
        )
    return Coding(
        words,
        tuple(batches),
        Grids(*(np.concatenate(parts, axis=-1) for parts in zip(*grids, strict=True))),
        group,
        checks_of(levels, group),
        len(initial),
        Lengths(*(np.concatenate(parts) for parts in zip(*lengths, strict=True))),
        first,
    )


def decode_chunk(
    codec: Codec,
    coding: Coding,
    *,
    condition: Condition | None = None,
    progress: Callable[[int], None] | None = None,
) -> Levels:
    """The images of a chunk, uint8 [N, C, H, W]. Raises DataError when they are not those that were coded.

    condition, progress: as in `encode_chunk`.
    """
    stack, done, first = Stack(coding.words, sealed=True), coding.images, coding.first_images
    levels = np.zeros((done, *codec.image_shape), np.uint8)
    for size in reversed(coding.batches):
        rows = slice(done - size, done)
        levels[rows] = codec.decode(
            stack,
            Grids(*(phases[..., done - size - first : done - first] for phases in coding.grids)),
            None if condition is None else condition[rows],
        )
        done -= size
        if progress is not None:
            progress(size)
    left = stack.given_words()
    if first:
        levels[:first] = _unpack(left, first, codec)
    wrong = [
        number
        for number, (check, wanted) in enumerate(
            zip(checks_of(levels, coding.group), coding.checks, strict=True)
        )
        if check != wanted
    ]
    if wrong:
        first = wrong[0] * coding.group
        last = min(len(levels), first + coding.group) - 1
        which = f"image {first}" if first == last else f"images {first} to {last}"
        raise DataError(f"{len(wrong)} of {len(coding.checks)} checksums differ, first of {which}")
    if left is None or (not first and not np.array_equal(left, initial_words(coding.initial_words))):
        raise DataError("the images are right, and the bits before the first one differ")
    return levels


def checks_of(levels: Levels, group: int) -> tuple[int, ...]:
    """The crc32 of each `group` images, one after the other."""
    return tuple(
        zlib.crc32(levels[first : first + group].tobytes()) for first in range(0, len(levels), group)
    )


def _beginning(levels: Levels, words: int, values: int) -> tuple[int, Words]:
    """The number of first images that are packed in the initial words, and these, at least `words` of them. values: number of levels."""
    if words <= MOST_EMPTY_WORDS:
        return 0, initial_words(words)
    few, many = 0, 1  # too few images, and perhaps enough
    while many < len(levels) and len(_pack(levels[:many], values)) < words:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if len(_pack(levels[:middle], values)) < words else (few, middle)
    if many >= len(levels):
        return 0, initial_words(words)
    return many, _pack(levels[:many], values)


def _pack(levels: Levels, values: int) -> Words:
    """Images as words: zlib of the differences between neighbours in a row or, if black and white, of the bits."""
    content = np.packbits(levels) if values == 2 else np.diff(levels, axis=-1, prepend=np.uint8(0))
    packed = zlib.compress(content.tobytes(), 9)
    return np.frombuffer(packed + bytes(-len(packed) % 4), "<u4").astype(np.uint32)


def _unpack(words: Words | None, images: int, codec: Codec) -> Levels:
    """The images of `_pack`. Raises DataError for other words."""
    shape = (images, *codec.image_shape)
    count = int(np.prod(shape))
    size = -(-count // 8) if codec.pixels.levels == 2 else count
    try:
        if words is None:
            raise ValueError
        content = zlib.decompressobj().decompress(words.astype("<u4").tobytes(), size)
        bytes_of_images = np.frombuffer(content, np.uint8, size)
    except (ValueError, zlib.error):
        raise DataError("the bits before the first coded image differ, and they hold images") from None
    if codec.pixels.levels == 2:
        return np.unpackbits(bytes_of_images, count=count).reshape(shape)
    return np.cumsum(bytes_of_images.reshape(shape), axis=-1, dtype=np.uint8)


def initial_words(number: int) -> Words:
    """The words that a chunk begins with: those of Philox 4x32-10 with key 0."""
    counters = torch.arange(-(-number // 4))
    zeros = torch.zeros_like(counters)
    words = torch.stack(noise.philox((counters, zeros, zeros, zeros), (0, 0)), dim=1).flatten()[:number]
    return words.numpy().astype(np.uint32)


def describe(coding: Coding) -> dict[str, Any]:
    """What a file holds of a coding besides words and checksums, for JSON."""
    grids = coding.grids
    of_priors = {"prior_phases": _sparse(grids.prior)} if grids.prior.any() else {}
    return {
        "batches": list(coding.batches),
        "posterior_phases": _sparse(grids.posterior),
        "pixel_phases": _sparse(grids.pixels),
        **of_priors,
        "group": coding.group,
        "initial_words": coding.initial_words,
        **({"first_images": coding.first_images} if coding.first_images else {}),
    }


def _sparse(phases: NDArray[np.uint8]) -> list[list[int]]:
    """The phases [B] or [G, B] that are not 0, as pairs of the number g B + b and the phase."""
    flat = phases.reshape(-1)
    (numbers,) = np.nonzero(flat)
    return [[int(number), int(flat[number])] for number in numbers]
