"""Mixtures of every kind with known parameters, and latents from them; q(z|x) whose information is known."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.mixtures.gaussian import Kind, Mixture, sample
from vaescale.mixtures.points import Points

FAR = torch.tensor([[-3.0, 0.0, 40.0], [2.0, 2.0, 40.0], [2.0, -3.0, 41.0]], dtype=torch.float64)


def known(kind: Kind) -> Mixture:
    """Three components in three dimensions, far from 0 along the last one."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64) * 0.4
    matrices = factors @ factors.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    covariances = {
        "full": matrices,
        "tied": matrices[0],
        "diag": matrices.diagonal(dim1=1, dim2=2).contiguous(),
        "spherical": torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64),
    }
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Mixture(weights, FAR.clone(), covariances[kind], kind)


def draws(mixture: Mixture, count: int, seed: int = 0) -> Tensor:
    """float64 [count, Z]."""
    return sample(mixture, noise.Stream(seed, 0, torch.arange(count))).double()


class GaussianCase(NamedTuple):
    """Moments of q(z|x) whose aggregate is the prior N(0, I), so that KL and total correlation are 0; I(x; z) in nats."""

    moments: Points
    mutual_information: float


def gaussian_case(count: int, size: int, variance: float = 0.34**2) -> GaussianCase:
    """Means from N(0, 1 - variance) in each of `size` latents, and one variance: I(x; z) = -size/2 ln(variance)."""
    mean = noise.normal(noise.Stream(9, 0, torch.arange(count)), noise.PRIOR, (size,)).double()
    mean = mean * math.sqrt(1 - variance)
    return GaussianCase(Points(mean, torch.full_like(mean, variance)), -0.5 * size * math.log(variance))
