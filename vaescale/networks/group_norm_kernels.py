# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803
"""Triton kernels of GroupNorm and SiLU on maps that are dense as [B, H, W, C]. Wu & He 2018; SiLU: Elfwing et al. 2018.

    forward   x^ = (x - mean) rstd,   h = weight x^ + bias,   y = h or h sigmoid(h)
    backward  g = dL/dh,   dbias = sum g,   dweight = sum g x^,
              dx = rstd (weight g - M[weight g] - x^ M[weight g x^])

where mean, rstd and M[.] are over a group of channels and all places of one image. The forward pass reads x twice and writes y;
the backward pass reads x and dy twice and writes dx. A program covers TILES tiles of [ROWS, BLOCK] places and channels of one
image; all arithmetic is in float32. Sums go through a buffer with one row for each program, in a fixed order: results are equal
bit for bit from run to run, and those of an image do not depend on the other images of the batch.

Legend: P = H W places, K = chunks of places, one for each program of an image, G = groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048  # 8 for each of 256 threads: one load of 16 bytes in bf16
MOST_TILES = 16
FEWEST_CHUNKS = 64  # so that a small batch of small maps occupies the device
MERGED_ELEMENTS = 2048
WARPS = 8


class Plan(NamedTuple):
    """The division of one image's places among programs. It depends on the map's shape alone."""

    block: int  # channels, padded to a power of two
    rows: int  # places in a tile
    tiles: int  # tiles in a chunk
    chunks: int


def plan(places: int, channels: int) -> Plan:
    """Divide [places, channels] into chunks."""
    block = triton.next_power_of_2(channels)
    rows = max(1, TILE_ELEMENTS // block)
    tiles = min(MOST_TILES, max(1, triton.cdiv(places, rows) // FEWEST_CHUNKS))
    # A power of two: few variants of each kernel are compiled.
    tiles = 1 << (tiles.bit_length() - 1)
    return Plan(block, rows, tiles, triton.cdiv(places, rows * tiles))


def merging(chunks: int, channels: int, groups: int) -> dict[str, int]:
    """Sizes for the kernels that sum over the chunks of an image: in one pass where these are few."""
    block = triton.next_power_of_2(channels // groups)
    together = min(triton.next_power_of_2(chunks), max(1, MERGED_ELEMENTS // block))
    return {
        "C": channels,
        "G": groups,
        "BLOCK": block,
        "CHUNKS": together,
        "PARTS": triton.cdiv(chunks, together),
    }


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y like x, and mean and rstd, both [B, G] in float32. x: [B, C, H, W], dense as [B, H, W, C]."""
    images, channels, height, width = x.shape
    places = height * width
    block, rows, tiles, chunks = plan(places, channels)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    partial = torch.empty(images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    mean, rstd = (torch.empty(images, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    tiling = {"C": channels, "BLOCK": block, "ROWS": rows, "TILES": tiles, "num_warps": WARPS}
    with torch.cuda.device_of(x):
        _moments[(images * chunks,)](x, partial, places, chunks, **tiling)
        _merge_moments[(images * groups,)](
            partial,
            mean,
            rstd,
            places,
            chunks,
            eps,
            CHUNK=rows * tiles,
            **merging(chunks, channels, groups),
        )
        _normalize[(images * chunks,)](
            x, y, mean, rstd, weight, bias, places, chunks, G=groups, SILU=silu, **tiling
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx like x, and dweight and dbias, both [C] in float32. dy: like x, dense in the same order."""
    images, channels, height, width = x.shape
    places, groups = height * width, mean.shape[1]
    block, rows, tiles, chunks = plan(places, channels)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    partial = torch.empty(images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    sums = torch.empty(images, 2, channels, dtype=torch.float32, device=x.device)
    means = torch.empty(images, 2, groups, dtype=torch.float32, device=x.device)
    tiling = {
        "C": channels,
        "G": groups,
        "BLOCK": block,
        "ROWS": rows,
        "TILES": tiles,
        "SILU": silu,
        "num_warps": WARPS,
    }
    with torch.cuda.device_of(x):
        _sum_gradients[(images * chunks,)](dy, x, mean, rstd, weight, bias, partial, places, chunks, **tiling)
        _merge_gradients[(images * groups,)](
            partial,
            weight,
            sums,
            means,
            places,
            chunks,
            **merging(chunks, channels, groups),
        )
        _input_gradient[(images * chunks,)](
            dy, x, dx, mean, rstd, weight, bias, means, places, chunks, **tiling
        )
    return dx, sums[:, 1].sum(0), sums[:, 0].sum(0)


@triton.jit(do_not_specialize=["places", "chunks"])
def _moments(
    x, partial, places, chunks, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over a chunk. Welford 1962; merged as in Chan et al. 1983."""
    program = tl.program_id(0)
    start = (program % chunks) * (ROWS * TILES)
    x += (program // chunks).to(tl.int64) * places * C
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mean = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    deviations = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        place = start + tile * ROWS + row
        inside = (place < places)[:, None] & (column < C)[None, :]
        value = tl.load(x + place[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (tile + 1))
        deviations += delta * (value - mean)
    count = tl.minimum(tl.maximum((places - start - row + ROWS - 1) // ROWS, 0), TILES).to(tl.float32)
    total = tl.sum(count, 0)
    center = tl.sum(count[:, None] * mean, 0) / total
    offset = mean - center[None, :]
    spread = tl.sum(deviations + count[:, None] * offset * offset, 0)
    partial += program.to(tl.int64) * (2 * C)
    tl.store(partial + column, center, mask=column < C)
    tl.store(partial + C + column, spread, mask=column < C)


@triton.jit(do_not_specialize=["places", "chunks"])
def _merge_moments(
    partial,
    mean,
    rstd,
    places,
    chunks,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of a group over all chunks of an image."""
    program = tl.program_id(0)
    width: tl.constexpr = C // G
    partial += (program // G).to(tl.int64) * chunks * (2 * C) + (program % G) * width
    offset, column = tl.arange(0, CHUNKS), tl.arange(0, BLOCK)
    number = (places * width).to(tl.float32)
    total = tl.zeros([CHUNKS, BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        chunk = part * CHUNKS + offset
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        count = tl.minimum(places - chunk * CHUNK, CHUNK).to(tl.float32)
        address = partial + chunk[:, None] * (2 * C) + column[None, :]
        total += count[:, None] * tl.load(address, mask=inside, other=0.0)
    center = tl.sum(tl.sum(total, 1), 0) / number
    spread = tl.zeros([CHUNKS, BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        chunk = part * CHUNKS + offset
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        count = tl.minimum(places - chunk * CHUNK, CHUNK).to(tl.float32)
        address = partial + chunk[:, None] * (2 * C) + column[None, :]
        delta = tl.load(address, mask=inside, other=0.0) - center
        deviations = tl.load(address + C, mask=inside, other=0.0)
        spread += tl.where(inside, deviations + count[:, None] * delta * delta, 0.0)
    variance = tl.sum(tl.sum(spread, 1), 0) / number
    tl.store(mean + program, center)
    tl.store(rstd + program, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["places", "chunks"])
def _normalize(
    x,
    y,
    mean,
    rstd,
    weight,
    bias,
    places,
    chunks,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SILU: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // chunks
    start = (program % chunks) * (ROWS * TILES)
    x += image.to(tl.int64) * places * C
    y += image.to(tl.int64) * places * C
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < C
    group = image * G + column // (C // G)
    center = tl.load(mean + group, mask=known, other=0.0)[None, :]
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    scale = (scale * tl.load(rstd + group, mask=known, other=0.0))[None, :]
    shift = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    for tile in range(TILES):
        place = start + tile * ROWS + row
        inside = (place < places)[:, None] & known[None, :]
        offset = place[:, None] * C + column[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        h = (value - center) * scale + shift
        if SILU:
            h = h / (1.0 + tl.exp(-h))
        tl.store(y + offset, h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _through_silu(gradient, h):
    """dL/dh from dL/dsilu(h)."""
    gate = 1.0 / (1.0 + tl.exp(-h))
    return gradient * gate * (1.0 + h * (1.0 - gate))


@triton.jit(do_not_specialize=["places", "chunks"])
def _sum_gradients(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    partial,
    places,
    chunks,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SILU: tl.constexpr,
):
    """Sums of g and of g x^ of each channel over a chunk."""
    program = tl.program_id(0)
    image = program // chunks
    start = (program % chunks) * (ROWS * TILES)
    x += image.to(tl.int64) * places * C
    dy += image.to(tl.int64) * places * C
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < C
    group = image * G + column // (C // G)
    center = tl.load(mean + group, mask=known, other=0.0)[None, :]
    inverse = tl.load(rstd + group, mask=known, other=0.0)[None, :]
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    product = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        place = start + tile * ROWS + row
        inside = (place < places)[:, None] & known[None, :]
        offset = place[:, None] * C + column[None, :]
        normal = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - center) * inverse
        gradient = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            gradient = _through_silu(gradient, normal * scale + shift)
        total += gradient
        product += gradient * normal
    partial += program.to(tl.int64) * (2 * C)
    tl.store(partial + column, tl.sum(total, 0), mask=known)
    tl.store(partial + C + column, tl.sum(product, 0), mask=known)


@triton.jit(do_not_specialize=["places", "chunks"])
def _merge_gradients(
    partial,
    weight,
    sums,
    means,
    places,
    chunks,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums of g and of g x^ of each channel over an image, and M[weight g] and M[weight g x^] of its group."""
    program = tl.program_id(0)
    image, group = program // G, program % G
    width: tl.constexpr = C // G
    partial += image.to(tl.int64) * chunks * (2 * C) + group * width
    sums += image * (2 * C) + group * width
    offset, column = tl.arange(0, CHUNKS), tl.arange(0, BLOCK)
    known = column < width
    total = tl.zeros([CHUNKS, BLOCK], dtype=tl.float32)
    product = tl.zeros([CHUNKS, BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        chunk = part * CHUNKS + offset
        inside = (chunk < chunks)[:, None] & known[None, :]
        address = partial + chunk[:, None] * (2 * C) + column[None, :]
        total += tl.load(address, mask=inside, other=0.0)
        product += tl.load(address + C, mask=inside, other=0.0)
    gradients, products = tl.sum(total, 0), tl.sum(product, 0)
    tl.store(sums + column, gradients, mask=known)
    tl.store(sums + C + column, products, mask=known)
    scale = tl.load(weight + group * width + column, mask=known, other=0.0).to(tl.float32)
    number = (places * width).to(tl.float32)
    tl.store(means + image * (2 * G) + group, tl.sum(scale * gradients, 0) / number)
    tl.store(means + image * (2 * G) + G + group, tl.sum(scale * products, 0) / number)


@triton.jit(do_not_specialize=["places", "chunks"])
def _input_gradient(
    dy,
    x,
    dx,
    mean,
    rstd,
    weight,
    bias,
    means,
    places,
    chunks,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SILU: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // chunks
    start = (program % chunks) * (ROWS * TILES)
    x += image.to(tl.int64) * places * C
    dy += image.to(tl.int64) * places * C
    dx += image.to(tl.int64) * places * C
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < C
    group = column // (C // G)
    center = tl.load(mean + image * G + group, mask=known, other=0.0)[None, :]
    inverse = tl.load(rstd + image * G + group, mask=known, other=0.0)[None, :]
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    constant = tl.load(means + image * (2 * G) + group, mask=known, other=0.0)[None, :]
    slope = tl.load(means + image * (2 * G) + G + group, mask=known, other=0.0)[None, :]
    for tile in range(TILES):
        place = start + tile * ROWS + row
        inside = (place < places)[:, None] & known[None, :]
        offset = place[:, None] * C + column[None, :]
        normal = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - center) * inverse
        gradient = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            gradient = _through_silu(gradient, normal * scale + shift)
        gradient = inverse * (gradient * scale - constant - normal * slope)
        tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=inside)
