"""Disentangled inferred prior, DIP-VAE I and II: a penalty that draws the covariance of the aggregate posterior to the identity.

    lambda_od sum_{i != j} C_ij^2 + lambda_d sum_i (C_ii - 1)^2                     Kumar et al. 2018, eq. 6 and 7
    I:  C = Cov_x[mu(x)]            II:  C = Cov_x[mu(x)] + E_x[diag sigma^2(x)]

over the images of the global batch.
"""

import torch
from torch import Tensor

from vaescale import comm
from vaescale.objectives.config import DipConfig


def dip(mu: Tensor, log_sigma: Tensor, config: DipConfig) -> Tensor:
    """The penalty [] of mu and log_sigma [B, Z], this rank's share of the global batch. Returns the same on all ranks."""
    covariance = global_covariance(mu)
    if config.variant == "ii":
        variances = _over_ranks(torch.exp(2 * log_sigma.double()).mean(0))
        covariance = covariance + torch.diag(variances)
    diagonal = covariance.diagonal()
    off = covariance.square().sum() - diagonal.square().sum()
    weight = config.diagonal
    if weight is None:
        weight = config.off_diagonal * (10 if config.variant == "i" else 1)
    return config.off_diagonal * off + weight * (diagonal - 1).square().sum()


def global_covariance(mu: Tensor) -> Tensor:
    """Cov_x[mu(x)] [Z, Z] over the images of all ranks, float64; a gradient passes through."""
    mu = mu.double()
    latents = mu.shape[1]
    means = _over_ranks(torch.cat([mu.mean(0), (mu.T @ mu / len(mu)).flatten()]))
    mean, second = means[:latents], means[latents:].view(latents, latents)
    return second - torch.outer(mean, mean)


def _over_ranks(means: Tensor) -> Tensor:
    """The mean of the ranks' means, because every rank has equally many images."""
    return comm.all_reduce_sum_with_gradient(means) / comm.world_size()
