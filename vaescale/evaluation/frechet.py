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


class Sums:
    """What moments need of features that come batch by batch: each batch is centred on its rows' mean, then merged exactly.

    Chan, Golub & LeVeque 1983, eq. 1.5b. Its memory does not grow with the number of features.
    """

    def __init__(self) -> None:
        self._sums = (0, torch.zeros(0), torch.zeros(0))

    def add(self, features: Tensor) -> None:
        """Add features [B, F] of this rank; B may be 0."""
        if len(features):
            rows = features.double().cpu()
            mean = rows.mean(0)
            batch = (len(rows), mean, (rows - mean).T @ (rows - mean))
            self._sums = _merged(self._sums, batch) if self._sums[0] else batch

    def moments(self) -> Moments:
        """The moments over all ranks, of which some may have no features. All ranks call it."""
        total, *others = [sums for sums in comm.gather_object(self._sums) if sums[0]]
        for sums in others:
            total = _merged(total, sums)
        count, mean, scatter = total
        return Moments(mean, scatter / (count - 1), count)


def moments(features: Iterable[Tensor]) -> Moments:
    """The moments of features [B, F] over all ranks, in one pass. A rank may have no features."""
    sums = Sums()
    for batch in features:
        sums.add(batch)
    return sums.moments()


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
