"""Which latents are used: KL by latent, active units, and the share that has collapsed. Lucas et al. 2019, definition 1.

A latent j is (epsilon, delta)-collapsed when KL(q(z_j|x) || p(z_j)) < epsilon for at least a share 1 - delta of the images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm
from vaescale.aggregate.points import Points

EPSILONS = tuple(10.0 ** (exponent / 4) for exponent in range(-16, 9))  # nats, 1e-4 to 1e2
DELTAS = (0.01, 0.1, 0.5)
ACTIVE_VARIANCE = 0.01


class Use(NamedTuple):
    """Of Z latents: mean KL in nats [Z], whether each is active [Z], and the collapsed share [deltas, epsilons]."""

    latent_kl: Tensor
    active: Tensor
    collapsed: Tensor


def use_of(moments: Points) -> Use:
    """Of latents in the prior's scale, given by the means and variances of q(z|x), over all ranks.

    active: the posterior mean's variance over the images is above 0.01 (Burda, Grosse & Salakhutdinov 2016, section 5.1).
    """
    assert moments.variance is not None, "moments were asked for"
    mean, variance = moments.z.double().cpu(), moments.variance.double().cpu()
    kl = 0.5 * (mean.square() + variance - 1 - variance.log())
    below = torch.stack([(kl < epsilon).double().sum(0) for epsilon in EPSILONS])  # [epsilons, Z]
    sums = torch.stack([kl.sum(0), mean.sum(0), mean.square().sum(0)])
    total = comm.all_reduce_sum(torch.cat([below, sums]).flatten()).view(-1, moments.size) / moments.count
    below, (latent_kl, first, second) = total[:-3], total[-3:]
    collapsed = torch.stack([(below >= 1 - delta).double().mean(1) for delta in DELTAS])
    return Use(latent_kl, second - first.square() > ACTIVE_VARIANCE, collapsed)
