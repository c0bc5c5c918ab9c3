"""The use of latents: KL of each latent, active units, and the share of collapsed latents. Lucas et al. 2019, definition 1.

A latent j is (epsilon, delta)-collapsed when KL(q(z_j|x) || p(z_j)) < epsilon for at least a share 1 - delta of the images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm
from vaescale.mixtures.points import Moments

EPSILONS = tuple(10.0 ** (exponent / 4) for exponent in range(-16, 9))  # nats, 1e-4 to 1e2
DELTAS = (0.01, 0.1, 0.5)
ACTIVE_VARIANCE = 0.01
ROWS = 1 << 14


class Use(NamedTuple):
    """Use of L latents: mean KL in nats [L], whether each is active [L], and the collapsed share [deltas, epsilons]."""

    latent_kl: Tensor
    active: Tensor
    collapsed: Tensor


def use_of(moments: Moments, places: int = 1) -> Use:
    """Measure the use of latents in the prior's scale, over all ranks, from the means and variances of q(z|x).

    places: number of places of a latent map, whose channels are the latents; 1 for a vector. The KL of a channel is summed over
    the places, and the variance of its mean is over images and places. A latent is active when the variance of its posterior
    mean is above 0.01 (Burda, Grosse & Salakhutdinov 2016, section 5.1).
    """
    latents = moments.size // places
    total = torch.zeros(len(EPSILONS) + 3, latents, dtype=torch.float64)
    for means, variances in moments.parts():
        assert variances is not None, "expected moments, got draws"
        for rows in zip(torch.split(means, ROWS), torch.split(variances, ROWS), strict=True):
            mean, variance = (tensor.double().cpu().view(len(tensor), latents, places) for tensor in rows)
            kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(2)
            below = torch.stack([(kl < epsilon).double().sum(0) for epsilon in EPSILONS])
            sums = torch.stack([kl.sum(0), mean.mean(2).sum(0), mean.square().mean(2).sum(0)])
            total += torch.cat([below, sums])
    total = comm.all_reduce_sum(total.flatten()).view(total.shape) / moments.count
    below, (latent_kl, first, second) = total[:-3], total[-3:]
    collapsed = torch.stack([(below >= 1 - delta).double().mean(1) for delta in DELTAS])
    return Use(latent_kl, second - first.square() > ACTIVE_VARIANCE, collapsed)
