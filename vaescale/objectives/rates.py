"""The cost of the KL: beta, free bits, capacity, balancing. Each takes the KL of a rank's images and returns [].

Free bits, capacity and balancing depend on means over the global batch, so their sums run over all ranks. Their
decisions (which latents are below the floor, which side of the capacity, which weights) carry no gradient, so the mean of the
ranks' losses and gradients equals that of one process.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vaescale import comm
from vaescale.objectives.config import CapacityConfig, FreeBitsConfig
from vaescale.schedules import Annealing, annealed

BALANCE_OFFSET = 0.01  # nats; keeps a group without KL from weighing nothing


def free_bits(latent_kl: Tensor, kl: Tensor, config: FreeBitsConfig) -> Tensor:
    """Free bits: sum_j max(nats, E_batch[KL_j]). Kingma et al. 2016, eq. 15. latent_kl [B, L], kl [B, G]."""
    columns = latent_kl if config.per == "latent" else kl
    paid = global_mean(columns) > config.nats
    return torch.where(paid, columns.mean(0), config.nats).sum()


def capacity(kl: Tensor, config: CapacityConfig, step: int) -> Tensor:
    """Capacity penalty: gamma |E_batch[KL] - C(step)|. Burgess et al. 2018, eq. 8. kl [B, G]."""
    distance = kl.sum(1).mean() - capacity_nats(config, step)
    above = global_mean(kl.sum(1, keepdim=True))[0] > capacity_nats(config, step)
    return config.weight * torch.where(above, distance, -distance)


def capacity_nats(config: CapacityConfig, step: int) -> float:
    """The capacity C in nats at a step, counted from 0."""
    return annealed(Annealing(schedule="linear", end=config.nats, steps=config.steps), step)


def group_shares(places: Sequence[int]) -> Tensor:
    """The shares alpha_g [G]: the places of each group's map, divided by the number of groups of that size."""
    return torch.tensor([count / places.count(count) for count in places])


def balanced(kl: Tensor, alpha: Tensor) -> Tensor:
    """Balanced KL: sum_g gamma_g E_batch[KL_g], with larger weights for groups with a larger KL. Vahdat & Kautz 2020, appendix A.

    kl [B, G], alpha [G] from `group_shares`. gamma_g is proportional to (E[KL_g] + 0.01) / alpha_g, with mean 1.
    """
    gamma = (global_mean(kl).to(kl) + BALANCE_OFFSET) / alpha
    return (gamma / gamma.mean() * kl.mean(0)).sum()


def global_mean(columns: Tensor) -> Tensor:
    """The mean of [B, N] over the images of all ranks, float64 [N], without a gradient."""
    columns = columns.detach().double()
    sums = comm.all_reduce_sum(torch.cat([columns.sum(0), columns.new_full((1,), len(columns))]))
    return sums[:-1] / sums[-1]
