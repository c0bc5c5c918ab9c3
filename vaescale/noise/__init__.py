"""Randomness that depends on position, never on history: Philox 4x32-10 in plain array arithmetic.

The value of slot i at step s is a function of (seed, purpose, s, i) alone, so it is the same on every rank, at
every world size and after every resume. Integer arithmetic makes the bits equal on CPU and GPU; the normals then
differ by the devices' log and cos only. Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3". (torch's own stateless generator, torch.func._random, has no CPU kernel in 2.13.)

`_words` chooses how the bits are computed; each way returns the bits of `philox`.

Legend: B slots, N numbers for each, T blocks of four numbers, of all purposes that are drawn together.
"""

import ctypes
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale.noise import gpu
from vaescale.system import native

STEPS = 1 << 32  # of a stream; slots and blocks of four numbers have as many
# Streams that must never share a counter. A hierarchical model adds its group's number.
POSTERIOR = 0 << 16
PRIOR = 1 << 16
DECODER = 2 << 16
MIXTURE = 3 << 16
FLIP = 4 << 16
DEQUANTIZE = 5 << 16
BINARIZE = 6 << 16
MATCHED_PRIOR = 7 << 16
HALF = 8 << 16
EQUIVARIANCE = 9 << 16
CODES = 10 << 16
CHOICE = 11 << 16
DROPOUT = 12 << 16
GENERATED = 16 << 16
AUGMENT = 17 << 16
LATENT = 18 << 16
VIEW = 20 << 16
CONDITION = 24 << 16
WINDOW = 26 << 16

# Blocks [B T] that are drawn together at most, 48 bytes each; a purpose that needs more is drawn alone.
MOST_BLOCKS = 1 << 19
# On a CPU, torch has one thread for so few elements too, and a call of numpy costs a third of torch's.
FEW_BLOCKS = 1 << 15
SOURCE = Path(__file__).with_name("philox.cpp")
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
Array = TypeVar("Array", Tensor, NDArray[np.int64])
Blocks = tuple[tuple[int, int], ...]


class Stream(NamedTuple):
    """Where noise is wanted: seed, step, and the slots of the global batch, int64 [B] on the device to draw on.

    A counter has 32 bits each for the step, the slot, the purpose and the block of four numbers: steps are from 0 to STEPS - 1,
    and steps or slots that differ by a multiple of 2^32 have the same noise. step_on_gpu: int64 [], used there in place of `step`,
    so that a CUDA graph reads it at each replay.
    """

    seed: int
    step: int
    slots: Tensor
    step_on_gpu: Tensor | None = None


def normal(stream: Stream, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals [B, *shape], float32, one independent row a slot (Box & Muller 1958)."""
    (rows,) = normals(stream, {purpose: math.prod(shape)})
    return rows.reshape(-1, *shape)


def normals(stream: Stream, numbers: Mapping[int, int]) -> Iterator[Tensor]:
    """The values of `normal` for several purposes, in their order, as [B, N] each. numbers: N by purpose.

    Purposes are drawn together when the first of them is taken, as many as fit into MOST_BLOCKS. The tensors of one draw share
    memory.
    """
    for together in _together(numbers, most=MOST_BLOCKS // max(1, len(stream.slots))):
        on_gpu = gpu.can_draw_on(stream.slots.device)
        rows = (
            _drawn_on_gpu(stream, together, normal=True) if on_gpu else _box_muller(_words(stream, together))
        )
        parts = (
            torch.split(rows, [4 * count for _, count in together], dim=1) if len(together) > 1 else (rows,)
        )
        for (purpose, _), part in zip(together, parts, strict=True):
            yield part if part.shape[1] == numbers[purpose] else part[:, : numbers[purpose]]


def uniform(stream: Stream, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Uniforms in [0, 1) [B, *shape], float32, one independent row a slot."""
    size = math.prod(shape)
    blocks: Blocks = ((purpose, _blocks(size)),)
    if gpu.can_draw_on(stream.slots.device):
        rows = _drawn_on_gpu(stream, blocks, normal=False)
    else:
        rows = (_words(stream, blocks) >> 8).permute(1, 2, 0).flatten(1).float().mul_(2.0**-24)
    return (rows if rows.shape[1] == size else rows[:, :size]).reshape(-1, *shape)


def philox(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Philox 4x32-10: four int64 arrays that hold uint32 values, and two uint32, to four more. The counters broadcast."""
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        (high, low), (other_high, other_low) = (
            _product(c, m) for c, m in zip((c2, c0), reversed(_MULTIPLIERS), strict=True)
        )
        c0, c1, c2, c3 = high ^ c1 ^ k0, low, other_high ^ c3 ^ k1, other_low
    return c0, c1, c2, c3


def _product(factor: Array, multiplier: int) -> tuple[Array, Array]:
    """The upper and the lower 32 bits of the product of two uint32 values."""
    if not torch.compiler.is_compiling():
        # The product wraps around in int64; an arithmetic shift and a mask still give its upper half.
        product = factor * multiplier
        return (product >> 32) & _MASK, product & _MASK
    # Overflow is undefined in the C++ that torch.compile writes for a CPU: the mask above is removed as superfluous, and some
    # steps have other numbers. In halves nothing overflows; fused, their operations cost next to nothing.
    upper, lower = (factor >> 16) * multiplier, (factor & 0xFFFF) * multiplier
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    (k0, k1), (w0, w1) = key, _WEYL
    return [((k0 + number * w0) & _MASK, (k1 + number * w1) & _MASK) for number in range(_ROUNDS)]


def _blocks(numbers: int) -> int:
    return -(-numbers // 4)


def _together(numbers: Mapping[int, int], *, most: int) -> Iterator[Blocks]:
    """Divide (purpose, T) into consecutive draws of at most `most` blocks, or of one purpose."""
    draw: list[tuple[int, int]] = []
    for purpose, size in numbers.items():
        if draw and sum(count for _, count in draw) + _blocks(size) > most:
            yield tuple(draw)
            draw = []
        draw.append((purpose, _blocks(size)))
    if draw:
        yield tuple(draw)


def _drawn_on_gpu(stream: Stream, blocks: Blocks, *, normal: bool) -> Tensor:
    """The numbers of the blocks, float32 [B, 4 T], from the kernel."""
    slots, step = stream.slots, stream.step_on_gpu
    if step is None:
        step = torch.full((), stream.step, dtype=torch.int64, device=slots.device)
    purposes, counts = map(list, zip(*blocks, strict=True))
    drawn: Tensor = gpu.draw(slots, step, purposes, counts, list(_key(stream)), normal)
    return drawn


def _key(stream: Stream) -> tuple[int, int]:
    return stream.seed & _MASK, stream.seed >> 32 & _MASK


def _words(stream: Stream, blocks: Blocks) -> Tensor:
    """Uint32 values in int64 [4, B, T], for the blocks (purpose, count)."""
    slots, key = stream.slots, _key(stream)
    step = stream.step & _MASK
    if torch.compiler.is_compiling():  # fuses plain arithmetic
        block = torch.cat([torch.arange(count, device=slots.device) for _, count in blocks])
        tag = torch.cat([torch.full((count,), purpose, device=slots.device) for purpose, count in blocks])
        return _stacked(*philox((block, slots[:, None] & _MASK, torch.full_like(block, step), tag), key))
    if slots.device.type == "cpu" and len(slots) * sum(count for _, count in blocks) <= FEW_BLOCKS:
        numbers, tags = _counters(blocks)
        words = philox((numbers, slots.numpy()[:, None] & _MASK, np.full_like(numbers, step), tags), key)
        return torch.from_numpy(np.stack(np.broadcast_arrays(*words)))
    block, tag = _counters_on(slots.device, blocks)
    plain = all(type(given) is Tensor and given.device.type == "cpu" for given in (slots, block, tag))
    if plain and (library := native.load(SOURCE)) is not None:
        return _compiled(library, slots.to(torch.int64).contiguous(), block, tag, step, key)
    return _philox_in_place(_stacked(block, slots[:, None], torch.full_like(block, step), tag), key)


def _compiled(
    library: ctypes.CDLL, slots: Tensor, block: Tensor, tag: Tensor, step: int, key: tuple[int, int]
) -> Tensor:
    words = slots.new_empty(4, len(slots), len(block))
    numbers = map(ctypes.c_int64, (len(block), step, *key))
    places = map(native.place, (block, tag))
    library.words(
        native.place(slots),
        ctypes.c_int64(len(slots)),
        *places,
        *numbers,
        native.place(words),
        torch.get_num_threads(),
    )
    return words


def _stacked(*counter: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*counter))  # type: ignore[no-untyped-call]


class _Row(NamedTuple):
    """One of four counters, int64 [B, T], and the 32-bit halves of its values, which share its memory."""

    whole: Tensor
    low: Tensor
    high: Tensor


def _philox_in_place(words: Tensor, key: tuple[int, int]) -> Tensor:
    """`philox` of the counters [4, B, T], which become its result: fewer operations and less memory.

    c0 and c2 stay below 2^32, and the halves of 64-bit products are read and written as they lie in memory, little endian:
    shifts and masks are not needed until the end.
    """
    (c0, c1, c2, c3), spare = _rows_of(words), _rows_of(torch.empty_like(words[:2]))
    own = before = c1, c3
    for number, (k0, k1) in enumerate(_round_keys(key)):
        now = own if number % 2 else (spare[0], spare[1])
        torch.mul(c2.whole, _MULTIPLIERS[1], out=now[0].whole)
        torch.mul(c0.whole, _MULTIPLIERS[0], out=now[1].whole)
        for counter, product, low, k in ((c0, now[0], before[0].low, k0), (c2, now[1], before[1].low, k1)):
            torch.bitwise_xor(product.high, low, out=counter.low).bitwise_xor_(k - (k >> 31 << 32))
        before = now
    words[1::2].bitwise_and_(_MASK)
    return words


def _rows_of(words: Tensor) -> tuple[_Row, ...]:
    low, high = words.unsqueeze(-1).view(torch.int32).unbind(-1)
    return tuple(map(_Row, words.unbind(), low.unbind(), high.unbind()))


@lru_cache(maxsize=64)
def _counters(blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of each block within its purpose, and its purpose, int64 [T]."""
    counts = [count for _, count in blocks]
    return np.concatenate([np.arange(count) for count in counts]), np.repeat(
        [tag for tag, _ in blocks], counts
    )


@lru_cache(maxsize=64)
def _counters_on(device: torch.device, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """`_counters` on a device."""
    block, tag = (torch.from_numpy(column.copy()).to(device) for column in _counters(blocks))
    return block, tag


def _box_muller(words: Tensor) -> Tensor:
    """Standard normals [B, 4 T] from words [4, B, T]; those of a block follow each other."""
    uniform = words.float().add_(0.5).mul_(2.0**-32)  # in (0, 1], so the logarithm is finite
    radius, angle = uniform[0::2].log_().mul_(-2.0).sqrt_(), uniform[1::2].mul_(2.0 * math.pi)
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return pairs.permute(1, 2, 0).flatten(1)
