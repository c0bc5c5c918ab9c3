"""The importance-weighted bound and its doubly reparameterized gradient.

    L_K = E[log 1/K sum_k w_k],   w_k = p(x, z_k) / q(z_k|x)                    Burda et al. 2016, eq. 8

L_1 is the ELBO, L_K rises with K to log p(x). Its gradient for the encoder, in which log q's own parameters are held and
which does not fade with K, is

    sum_k v_k^2 d log w_k / d z_k  d z_k / d phi,   v_k = w_k / sum w           Tucker et al. 2019, eq. 8

The decoder's stays sum_k v_k d log w_k / d theta. One v_k comes from the loss below, the other from a hook on z in the model.
"""

import math

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.config import IwaeConfig


class Iwae:
    """A rank's share of the loss: the mean over ranks is the global batch's."""

    def __init__(self, config: IwaeConfig, model: VAE) -> None:  # noqa: ARG002
        self.importance_samples = config.samples
        self.doubly_reparameterized = config.gradient == "doubly_reparameterized"

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        """The loss [] in nats per image: -L_K, with either gradient; and neg_iwae_nats, the same."""
        bound = log_mean_exp(terms.log_weights).mean()
        pieces = {"neg_iwae_nats": -bound}
        if not self.doubly_reparameterized:
            return -bound, pieces
        share = torch.softmax(terms.log_weights.detach(), dim=1)
        weighted = (share * terms.log_weights).sum(1).mean()  # its gradient is the bound's
        return -(weighted + (bound - weighted).detach()), pieces

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Nothing changes over training."""
        return {}


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log 1/K sum_k w_k, from log weights [B, K] to [B]."""
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])
