"""The Frechet distance of two Gaussians, and the moments of features. Heusel et al. 2017, eq. 6.

d^2 = |m_1 - m_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm


class Moments(NamedTuple):
    """Moments of features, float64: mean [F], covariance [F, F] (divided by their number - 1, as FID does), and their number."""

    mean: Tensor
    covariance: Tensor
    images: int


def moments(features: Iterable[Tensor]) -> Moments:
    """The moments of features [B, F] over all ranks, in one pass: each batch is centred on its rows mean, then merged exactly.

    Chan, Golub & LeVeque 1983, eq. 1.5b. A rank may have no features.
    """
    count, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
    for batch in features:
        if not len(batch):
            continue
        rows = batch.double().cpu()
        batch_mean = rows.mean(0)
        batch_scatter = (rows - batch_mean).T @ (rows - batch_mean)
        if count == 0:
            count, mean, scatter = len(rows), batch_mean, batch_scatter
            continue
        count, mean, scatter = _merged((count, mean, scatter), (len(rows), batch_mean, batch_scatter))
    collected = [statistics for statistics in comm.gather_object((count, mean, scatter)) if statistics[0]]
    total = collected[0]
    for statistics in collected[1:]:
        total = _merged(total, statistics)
    count, mean, scatter = total
    return Moments(mean, scatter / (count - 1), count)


def moments_here(features: Tensor) -> Moments:
    """The moments of features [N, F] of this rank alone."""
    rows = features.double().cpu()
    centred = rows - rows.mean(0)
    return Moments(rows.mean(0), centred.T @ centred / (len(rows) - 1), len(rows))


def frechet_distance(one: Moments, other: Moments) -> float:
    """The squared distance d^2, computed in float64.

    The trace of the root is the sum of the square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2).
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    distance = (one.mean - other.mean).square().sum() + traces - 2 * cross
    return float(distance.clamp_min(0))


def _merged(one: tuple[int, Tensor, Tensor], other: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    (count, mean, scatter), (more, other_mean, other_scatter) = one, other
    total = count + more
    step = other_mean - mean
    mean = mean + step * (more / total)
    return total, mean, scatter + other_scatter + torch.outer(step, step) * (count * more / total)
