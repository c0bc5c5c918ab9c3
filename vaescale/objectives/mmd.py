"""The maximum mean discrepancy between the aggregate posterior and the prior: the WAE-MMD of Tolstikhin et al. 2018.

    MMD = 1/(n(n-1)) sum_{i != j} (k(z_i, z_j) + k(p_i, p_j)) - 2/n^2 sum_{ij} k(z_i, p_j)     their algorithm 2

over the n images of the global batch, with p_i drawn from N(0, I). The estimate is unbiased, and can be negative.
"""

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.objectives.config import MmdConfig

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd(z: Tensor, stream: noise.Stream, config: MmdConfig) -> Tensor:
    """The discrepancy [] of z [B, Z], this rank's share of the global batch. Returns the same on all ranks."""
    prior = noise.normal(stream, noise.MATCHED_PRIOR, (z.shape[1],)).to(z)
    z, prior = (gathered(draws) for draws in (z, prior))
    n = len(z)
    within = _kernel_sum(z, z, config.kernel) + _kernel_sum(prior, prior, config.kernel)
    within = within - 2 * n * len(SCALES)  # k(z, z) = 1
    return within / (n * (n - 1)) - 2 * _kernel_sum(z, prior, config.kernel) / n**2


def gathered(rows: Tensor) -> Tensor:
    """Gather [B, Z] of every rank to float64 [B world_size, Z], in the order of the ranks, with gradient."""
    ranks, own_rank = comm.world_size(), comm.rank()
    rows = rows.double()
    if ranks == 1:
        return rows
    empty = torch.zeros_like(rows)
    placed = torch.cat([rows if rank == own_rank else empty for rank in range(ranks)])
    return comm.all_reduce_sum_with_gradient(placed.flatten()).view_as(placed)


def _kernel_sum(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """The sum over i, j of k(a_i, b_j), summed over bandwidths C around the mean squared distance 2 Z of two draws."""
    products = a @ b.T
    distances = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * products).clamp_min(0)
    total = distances.new_zeros(())
    for scale in SCALES:
        bandwidth = 2 * a.shape[1] * scale
        values = bandwidth / (bandwidth + distances) if kernel == "imq" else torch.exp(-distances / bandwidth)
        total = total + values.sum()
    return total
