"""The importance-weighted bound and its doubly reparameterized gradient.

    L_K = E[log 1/K sum_k w_k],   w_k = p(x, z_k) / q(z_k|x)                    Burda et al. 2016, eq. 8

L_1 is the ELBO, and L_K rises with K to log p(x). The gradient for the encoder with log q's own parameters held constant, which
does not vanish with K, is

    sum_k v_k^2 d log w_k / d z_k  d z_k / d phi,   v_k = w_k / sum w           Tucker et al. 2019, eq. 8

The gradient for the decoder remains sum_k v_k d log w_k / d theta. One v_k comes from the loss below, the other from a hook on z in the model.
"""

import math

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.config import IwaeConfig


class Iwae:
    """The IWAE objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    def __init__(self, config: IwaeConfig, model: VAE) -> None:  # noqa: ARG002
        self.importance_samples = config.samples
        self.doubly_reparameterized = config.gradient == "doubly_reparameterized"

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        """The loss [] in nats per image, whose gradient is either of the two; and neg_iwae_nats, the value of -L_K."""
        bound = log_mean_exp(terms.log_weights).mean()
        pieces = {"neg_iwae_nats": -bound}
        if not self.doubly_reparameterized:
            return -bound, pieces
        share = torch.softmax(terms.log_weights.detach(), dim=1)
        weighted = (share * terms.log_weights).sum(1).mean()  # its gradient is the bound's
        return -(weighted + (bound - weighted).detach()), pieces

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Empty, because no value changes over training."""
        return {}


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Compute log 1/K sum_k w_k, from log weights [B, K] to [B]."""
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])
