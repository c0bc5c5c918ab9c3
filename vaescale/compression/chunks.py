"""A chunk: images that share one stack of bits, and can be decoded without the other chunks of a file.

The first images choose their latents from initial words that a known generator makes, and which are left at the bottom of the stack
when all is decoded. A batch holds as many images as the bits on the stack suffice for: one image at first, and soon all that fit.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import noise
from vaescale.compression.ans import WORD_BITS, Stack, Words
from vaescale.compression.bits_back import Codec, Grids, Labels, Lengths
from vaescale.errors import DataError

SPARE_WORDS = 4
CHECK_BYTES, CHECK_SHARE = 4, 0.002
"""The checksums of a chunk may take this share of its code; a checksum is then of several small images."""
Levels = NDArray[np.uint8]


class Coding(NamedTuple):
    """The code of a chunk's images: the words, the sizes of its batches, the phases of its images, a crc32 for each `group` of them.

    initial_words: their number. lengths: of the images; None in a chunk that was read.
    """

    words: Words
    batches: tuple[int, ...]
    grids: Grids
    group: int
    checks: tuple[int, ...]
    initial_words: int
    lengths: Lengths | None = None


def encode_chunk(
    codec: Codec,
    levels: Levels,
    *,
    labels: Labels | None = None,
    group: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Coding:
    """Code images uint8 [N, C, H, W]. labels: the classes [N] that a model with a condition needs. group: number of images of a checksum;
    None: so that they take 0.2% of the code at most.

    progress: called with the number of images of each batch that is done.
    """
    need = max(1, codec.latents * codec.latent_bits)  # bits that an image takes off the stack, at most
    initial = initial_words(-(-need // WORD_BITS) + SPARE_WORDS)
    stack = Stack(initial)
    batches, grids, lengths = list[int](), list[Grids](), list[Lengths]()
    while (done := sum(batches)) < len(levels):
        size = min(codec.batch, len(levels) - done, max(1, (stack.bits - SPARE_WORDS * WORD_BITS) // need))
        rows = slice(done, done + size)
        coded, of_images = codec.encode(
            stack, levels[rows].astype(np.int64), None if labels is None else labels[rows]
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
    )


def decode_chunk(
    codec: Codec,
    coding: Coding,
    *,
    labels: Labels | None = None,
    progress: Callable[[int], None] | None = None,
) -> Levels:
    """The images of a chunk, uint8 [N, C, H, W]. Raises DataError when they are not those that were coded.

    labels, progress: as in `encode_chunk`.
    """
    stack, done = Stack(coding.words, sealed=True), sum(coding.batches)
    levels = np.zeros((done, *codec.image_shape), np.uint8)
    for size in reversed(coding.batches):
        rows = slice(done - size, done)
        levels[rows] = codec.decode(
            stack,
            Grids(*(phases[..., rows] for phases in coding.grids)),
            None if labels is None else labels[rows],
        )
        done -= size
        if progress is not None:
            progress(size)
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
    left = stack.given_words()
    if left is None or not np.array_equal(left, initial_words(coding.initial_words)):
        raise DataError("the images are right, and the bits before the first one differ")
    return levels


def checks_of(levels: Levels, group: int) -> tuple[int, ...]:
    """The crc32 of each `group` images, one after the other."""
    return tuple(
        zlib.crc32(levels[first : first + group].tobytes()) for first in range(0, len(levels), group)
    )


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
    }


def _sparse(phases: NDArray[np.uint8]) -> list[list[int]]:
    """The phases [B] or [G, B] that are not 0, as pairs of the number g B + b and the phase."""
    flat = phases.reshape(-1)
    (numbers,) = np.nonzero(flat)
    return [[int(number), int(flat[number])] for number in numbers]
