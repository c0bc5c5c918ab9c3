"""The norm of a gradient, to float32's accuracy also for large weights.

On a CPU torch (2.13) adds the squares of a tensor in float32 in a few long sums, on one core. The norm of 13 million draws of a standard normal is
0.05% too small, that of 100 million 1%; from the norms of pieces it is right to 1e-6 and takes half the time on two cores
(findings/torch_norm_loses_digits_on_a_cpu.sh). Partitions of FSDP2 are taken by rows, so only their long rows keep torch's error.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LARGE = 1 << 20
"""Values from which on a tensor is taken in pieces; below, an operation more costs as much as it saves."""
PIECE = 1 << 12


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm [] of all gradients as one vector, in their precision; 0 of none. Partitioned tensors give a partitioned norm."""
    return torch.nn.utils.get_total_norm([part for gradient in gradients for part in _parts(gradient)])


def _parts(gradient: Tensor) -> Iterator[Tensor]:
    """Tensors whose norm together is that of the gradient."""
    if gradient.device.type != "cpu" or gradient.layout is not torch.strided or gradient.numel() < LARGE:
        yield gradient
    elif type(gradient) is Tensor and _is_dense(gradient):
        pieces, rest = divmod(gradient.numel(), PIECE)
        yield torch.linalg.vector_norm(gradient.as_strided((pieces, PIECE), (PIECE, 1)), dim=1)
        if rest:
            yield gradient.as_strided((rest,), (1,), gradient.storage_offset() + pieces * PIECE)
    elif gradient.dim() > 1:
        yield torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
    else:
        yield gradient


def _is_dense(gradient: Tensor) -> bool:
    """Whether the values fill a piece of memory, in a usual order."""
    formats = [torch.contiguous_format, *([torch.channels_last] if gradient.dim() == 4 else [])]
    return any(gradient.is_contiguous(memory_format=one) for one in formats)
