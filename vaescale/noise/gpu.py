"""The noise of this package on a GPU, in one kernel per draw: the same Philox words, hence uniforms equal bit for bit.

The logarithm, sine and cosine of the normals are the device's own. An operator of torch's library, so that torch.compile takes
it as it is: inductor narrows the plain 64-bit arithmetic to 32 bits and then refuses Philox's constants (torch 2.11).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vaescale.kernels import kernels_run

WIDTH = 256  # blocks of four numbers that one program computes


def can_draw_on(device: torch.device) -> bool:
    """Whether the kernel runs on this device."""
    return device.type == "cuda" and kernels_run()


@torch.library.custom_op("vaescale::draw", mutates_args=())
def draw(
    slots: Tensor, step: Tensor, purposes: list[int], counts: list[int], key: list[int], normal: bool
) -> Tensor:
    """Normals, or uniforms in [0, 1), float32 [B, 4 T]: T blocks of four numbers, `counts` of them for each of `purposes`.

    slots: int64 [B]; step: int64 [], both on the GPU. key: the lower and the upper 32 bits of the seed.
    """
    block, tag = _counters(slots.device, tuple(purposes), tuple(counts))
    out = torch.empty(len(slots), 4 * len(block), device=slots.device)
    grid = (-(-len(block) // WIDTH), len(slots))
    words = map(_signed, key)
    _kernel()[grid](out, slots.contiguous(), step, block, tag, len(block), *words, NORMAL=normal, WIDTH=WIDTH)
    return out


def _like_draw(slots: Tensor, step: Tensor, purposes: list[int], counts: list[int], *_: object) -> Tensor:  # noqa: ARG001
    return slots.new_empty(len(slots), 4 * sum(counts), dtype=torch.float32)


draw.register_fake(_like_draw)


@lru_cache(maxsize=4096)  # all of a ladder's groups: nothing may be copied while a CUDA graph is captured
def _counters(
    device: torch.device, purposes: tuple[int, ...], counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The number of each block within its purpose, and its purpose, int32 [T]."""
    block = torch.cat([torch.arange(count, dtype=torch.int32) for count in counts])
    tag = torch.repeat_interleave(torch.tensor(purposes, dtype=torch.int32), torch.tensor(counts))
    return block.to(device), tag.to(device)


def _signed(word: int) -> int:
    """The int32 with the bits of a uint32."""
    return word - (word >> 31 << 32)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Import Triton where it is needed: a CPU's torch has none."""
    from vaescale.noise import kernel

    return kernel.philox
