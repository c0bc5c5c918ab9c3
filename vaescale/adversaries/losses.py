"""Losses of the two players, of logits u, in nats. f+(u) = -log sigmoid(u), f-(u) = -log sigmoid(-u).

               discriminator, data    discriminator, fakes    autoencoder, fakes
hinge          relu(1 - u)            relu(1 + u)             -u               Lim & Ye 2017; Esser et al. 2021
non_saturating f+(u)                  f-(u)                   f+(u)            Goodfellow et al. 2014, section 3
vanilla        f+(u)                  f-(u)                   -f-(u)           Goodfellow et al. 2014, eq. 1
"""

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from vaescale import comm
from vaescale.adversaries.config import Loss

LECAM_DECAY = 0.999


def on_data(loss: Loss, logits: Tensor) -> Tensor:
    """The discriminator's loss [] of logits of what it should accept, of any shape."""
    return (relu(1 - logits) if loss == "hinge" else softplus(-logits)).mean()


def on_fakes(loss: Loss, logits: Tensor) -> Tensor:
    """The discriminator's loss [] of logits of what it should refuse."""
    return (relu(1 + logits) if loss == "hinge" else softplus(logits)).mean()


def fooling(loss: Loss, logits: Tensor) -> Tensor:
    """The autoencoder's loss [] of the logits of what it makes."""
    if loss == "hinge":
        return -logits.mean()
    return (softplus(-logits) if loss == "non_saturating" else -softplus(logits)).mean()


def lecam(accepted: Tensor, refused: Tensor, running: Tensor) -> Tensor:
    """relu(mean d(x) - ema_fake)^2 + relu(ema_real - mean d(G))^2, as a number [], the same on all ranks. Tseng et al. 2021, eq. 5.

    accepted, refused: this rank's logits of data and fakes; their means are the global batch's. running: float64 [2], ema_real and
    ema_fake, which this call moves.
    """
    sums = torch.stack([accepted.mean(), refused.mean()])
    means = comm.all_reduce_sum_with_gradient(sums) / comm.world_size()  # every rank has equally many images
    real, fake = running.clone().unbind()
    running.lerp_(means.detach(), 1 - LECAM_DECAY)
    return relu(means[0] - fake).square() + relu(real - means[1]).square()
