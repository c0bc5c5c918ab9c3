"""Whether this machine decodes what another one coded: a fingerprint of the codec's arithmetic, taken from a test pattern.

It has some of the networks' float64 outputs, which must agree to a quarter of the rounding's margin, and a hash of the words that the
pattern is coded into, which all later arithmetic must reproduce to the bit.
"""

import base64
import hashlib
import importlib.metadata
import platform
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.compression.ans import WORD_BITS, Stack
from vaescale.compression.arithmetic import Reals
from vaescale.compression.bits_back import Codec, Condition
from vaescale.compression.chunks import SPARE_WORDS, initial_words
from vaescale.errors import UserError

SAMPLES = 8  # outputs of each network that a fingerprint holds
ALLOWED = 0.25  # of the margin
NAMES = ("q(z|x)", "p(x|z)", "p(z)")  # of the outputs


class Fingerprint(NamedTuple):
    """outputs: base64 of SAMPLES float64 numbers of q(z|x), of p(x|z) and of learned priors, little-endian; words: sha256 of the pattern's
    code."""

    outputs: str
    words: str

    @property
    def numbers(self) -> Reals:
        """The outputs [2 or 3, SAMPLES]. Raises ValueError if they are not so many."""
        raw = base64.b64decode(self.outputs, validate=True)
        return np.frombuffer(raw, "<f8").reshape(-1, SAMPLES)


def fingerprint(codec: Codec) -> Fingerprint:
    """The fingerprint of a codec on this machine. Raises UserError for a model whose outputs depend too much on the batch's shape."""
    levels, condition = _pattern(codec)
    bins = (np.arange(len(levels) * codec.latents) * 2_654_435_761 >> 7) % (1 << codec.latent_bits)
    bins = bins.reshape(len(levels), -1)
    rows = np.arange(codec.batch) % len(levels)
    shapes = [codec.outputs(levels[few], bins[few], condition[few]) for few in (slice(None), rows, slice(1))]
    samples = []
    for name, margin, values, *others in zip(NAMES, codec.margins, *shapes, strict=True):
        if not values.size:
            continue
        distances = [np.abs(values[: len(other)] - other[: len(values)]).max() for other in others]
        if not max(distances) < ALLOWED * margin:
            raise UserError(
                f"the model's {name} differs by {max(distances):.1e} between batches of other sizes, and at most {ALLOWED * margin:.1e} "
                "can be coded; its weights are too large for lossless coding"
            )
        places = np.linspace(0, values.size - 1, SAMPLES).astype(np.int64)
        samples.append(values.reshape(-1)[places])
    need = len(levels) * codec.taken_bits // WORD_BITS
    stack = Stack(initial_words(need + SPARE_WORDS))
    grids, _ = codec.encode(stack, levels, condition)
    code = [phases.tobytes() for phases in (grids if codec.learned_prior else grids[:2])] + [
        stack.words().astype("<u4").tobytes()
    ]
    outputs = base64.b64encode(np.stack(samples).astype("<f8").tobytes()).decode()
    return Fingerprint(outputs, hashlib.sha256(b"".join(code)).hexdigest())


def refuse_other_arithmetic(codec: Codec, given: Fingerprint, *, written_with: str) -> None:
    """Raise UserError where this machine would decode other images. written_with: `versions` of the machine that wrote them."""
    mine = fingerprint(codec)
    try:
        numbers = given.numbers.reshape(mine.numbers.shape)
    except ValueError:
        raise UserError("the file's test pattern is damaged; get the file again") from None
    apart = np.abs(mine.numbers - numbers).max(1)
    for name, distance, margin in zip(NAMES, apart, codec.margins, strict=False):
        if not distance < ALLOWED * margin:
            raise UserError(
                f"this machine computes the model's {name} {distance:.1e} away from the machine that wrote the file, and up to "
                f"{ALLOWED * margin:.1e} decodes right; the file was written with {written_with}, this is {versions()}"
            )
    if mine.words != given.words:
        raise UserError(
            f"this machine codes the file's test pattern in other bits; the file was written with {written_with}, this is {versions()}"
        )


def versions() -> str:
    """The libraries whose arithmetic matters, and the processor's kind, in words."""
    libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "constriction"))
    return ", ".join([*libraries, platform.machine()])


def _pattern(codec: Codec) -> tuple[NDArray[np.int64], Condition]:
    """Images for the middle shape, waves and noise of whole numbers, and classes or vectors."""
    shape = (codec.small_batch, *codec.image_shape)
    number = np.arange(int(np.prod(shape))).reshape(shape)
    levels = (number * 2_654_435_761 >> 9) % 17 * (number % 97) % codec.pixels.levels
    if codec.vector_size:
        steps = np.arange(len(levels) * codec.vector_size).reshape(len(levels), -1)
        return levels, (steps % 9 / 4 - 1).astype(np.float32)
    return levels, np.arange(len(levels)) % max(1, codec.classes)
