"""Randomness that depends on position, never on history: Philox 4x32-10 in plain tensor arithmetic.

The value of slot i at step s is a function of (seed, purpose, s, i) alone, so it is the same on every rank, at
every world size and after every resume. Integer arithmetic makes the bits equal on CPU and GPU; the normals then
differ by the devices' log and cos only. Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3". (torch's own stateless generator, torch.func._random, has no CPU kernel in 2.13.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Streams that must never share a counter. A hierarchical model adds its group's number.
POSTERIOR = 0 << 16
PRIOR = 1 << 16
DECODER = 2 << 16
MIXTURE = 3 << 16
FLIP = 4 << 16
DEQUANTIZE = 5 << 16
BINARIZE = 6 << 16
MATCHED_PRIOR = 7 << 16

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(NamedTuple):
    """Where noise is wanted: seed, step, and the slots of the global batch, int64 [B] on the device to draw on."""

    seed: int
    step: int
    slots: Tensor


def normal(stream: Stream, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals [B, *shape], float32, one independent row a slot (Box & Muller 1958)."""
    bits = _bits(stream, purpose, math.prod(shape))
    uniform = (bits.float() + 0.5) * 2.0**-32  # in (0, 1], so the logarithm is finite
    radius = torch.sqrt(-2.0 * torch.log(uniform[0::2]))
    angle = (2.0 * math.pi) * uniform[1::2]
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])  # [4, B, blocks]
    return _rows(pairs, shape)


def uniform(stream: Stream, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Uniforms in [0, 1) [B, *shape], float32, one independent row a slot."""
    bits = _bits(stream, purpose, math.prod(shape))
    return _rows((bits >> 8).float() * 2.0**-24, shape)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four int64 tensors that hold uint32 values, and two uint32, to four more."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high, low), (other_high, other_low) = (
            _product(c, m) for c, m in zip((c2, c0), reversed(_MULTIPLIERS), strict=True)
        )
        c0, c1, c2, c3 = high ^ c1 ^ k0, low, other_high ^ c3 ^ k1, other_low
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _product(factor: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of two uint32 values."""
    if not torch.compiler.is_compiling():
        # The product wraps around in int64; an arithmetic shift and a mask still give its upper half.
        product = factor * multiplier
        return (product >> 32) & _MASK, product & _MASK
    # Overflow is undefined in the C++ that torch.compile writes for a CPU: the mask above is removed as superfluous, and some
    # steps have other numbers. In halves nothing overflows; fused, their operations cost next to nothing.
    upper, lower = (factor >> 16) * multiplier, (factor & 0xFFFF) * multiplier
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


def _bits(stream: Stream, purpose: int, numbers: int) -> Tensor:
    """Uint32 values in int64 [4, B, ceil(numbers / 4)]."""
    blocks = -(-numbers // 4)
    slots = stream.slots.view(-1, 1).expand(-1, blocks)
    block = torch.arange(blocks, device=slots.device).expand_as(slots)
    step = torch.full_like(block, stream.step & _MASK)
    tag = torch.full_like(block, purpose)
    key = (stream.seed & _MASK, stream.seed >> 32 & _MASK)
    return torch.stack(philox((block, slots & _MASK, step, tag), key))


def _rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[4, B, blocks] to [B, *shape], without the surplus of the last block."""
    rows = values.permute(1, 2, 0).flatten(1)
    return rows[:, : math.prod(shape)].reshape(-1, *shape)
