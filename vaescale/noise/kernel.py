# mypy: ignore-errors
# ruff: noqa: N803
"""Philox 4x32-10 and the numbers made from its words, as a kernel for a GPU. Imported only there: it needs Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "key_low", "key_high"])
def philox(
    out, slots, step, block, tag, blocks, key_low, key_high, NORMAL: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the numbers of WIDTH blocks of one slot into out [B, 4 blocks]; see `gpu.draw`. A program for each (block, slot)."""
    row = tl.program_id(1)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < blocks
    c0 = tl.load(block + column, mask=inside, other=0).to(tl.uint32, bitcast=True)
    c1 = tl.zeros_like(c0) + tl.load(slots + row).to(tl.uint32)
    c2 = tl.zeros_like(c0) + tl.load(step).to(tl.uint32)
    c3 = tl.load(tag + column, mask=inside, other=0).to(tl.uint32, bitcast=True)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    first, second = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        low, high = c0 * first, c2 * second
        c0, c2 = tl.umulhi(c2, second) ^ c1 ^ k0, tl.umulhi(c0, first) ^ c3 ^ k1
        c1, c3 = high, low
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    place = out + (row.to(tl.int64) * blocks + column) * 4
    if NORMAL:  # Box & Muller 1958
        u0, u1 = (c0.to(tl.float32) + 0.5) * 2.0**-32, (c1.to(tl.float32) + 0.5) * 2.0**-32
        u2, u3 = (c2.to(tl.float32) + 0.5) * 2.0**-32, (c3.to(tl.float32) + 0.5) * 2.0**-32
        radius0, angle0 = tl.sqrt(-2.0 * tl.log(u0)), 6.283185307179586 * u1
        radius1, angle1 = tl.sqrt(-2.0 * tl.log(u2)), 6.283185307179586 * u3
        tl.store(place, radius0 * tl.cos(angle0), mask=inside)
        tl.store(place + 1, radius1 * tl.cos(angle1), mask=inside)
        tl.store(place + 2, radius0 * tl.sin(angle0), mask=inside)
        tl.store(place + 3, radius1 * tl.sin(angle1), mask=inside)
    else:
        tl.store(place, (c0 >> 8).to(tl.float32) * 2.0**-24, mask=inside)
        tl.store(place + 1, (c1 >> 8).to(tl.float32) * 2.0**-24, mask=inside)
        tl.store(place + 2, (c2 >> 8).to(tl.float32) * 2.0**-24, mask=inside)
        tl.store(place + 3, (c3 >> 8).to(tl.float32) * 2.0**-24, mask=inside)
