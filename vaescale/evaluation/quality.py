"""Distance of samples from images by their features [N, F]: a kernel distance, and the overlap of the two sets.

    kernel distance     the squared maximum mean discrepancy of k(x, y) = (x . y / F + 1)^3, unbiased    Binkowski et al. 2018
    precision, recall   samples within the images' manifold, images within the samples': a manifold is the balls around its
                        points that reach to their k-th neighbours                                       Kynkaanniemi et al. 2019
    density, coverage   how many images' balls hold a sample, over k; images whose ball holds a sample   Naeem et al. 2020

A point as far away as the k-th neighbour is within the ball, as in Kynkaanniemi et al. 2019, eq. 2; the code of Naeem et al., the
package prdc, leaves it out. Features with few values have many such ties.

The Frechet distance is in `frechet.py`. All in float64, block by block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 2000


class Overlap(NamedTuple):
    """Overlap of samples and images: shares in [0, 1]; only density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def kernel_distance(images: Tensor, samples: Tensor) -> float:
    """The unbiased kernel distance of images [N, F] and samples [M, F], at least two each.

    It can be slightly negative for equal distributions.
    """
    size = images.shape[1]

    def total(x: Tensor, y: Tensor) -> Tensor:
        parts = torch.split(x.double(), BLOCK)
        return torch.stack([((rows @ y.double().T) / size + 1).pow(3).sum() for rows in parts]).sum()

    def within(x: Tensor) -> Tensor:
        diagonal = (x.double().square().sum(1) / size + 1).pow(3).sum()  # pairs of a row with itself
        return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

    between = total(images, samples) / (len(images) * len(samples))
    return float(within(images) + within(samples) - 2 * between)


def overlap(images: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> Overlap:
    """Precision, recall, density and coverage of images [N, F] and samples [M, F], more than `neighbours` each."""
    image_radii, sample_radii = (_radii(points, neighbours) for points in (images, samples))
    held = torch.zeros(len(samples), dtype=torch.float64)  # number of images' balls that hold each sample
    recalled, covered = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
    for start in range(0, len(images), BLOCK):
        block = slice(start, start + BLOCK)
        distance = _squared_distances(images[block], samples)
        inside = distance <= image_radii[block, None]
        held += inside.sum(0)
        covered[block] = inside.any(1)
        recalled[block] = (distance <= sample_radii).any(1)
    return Overlap(
        precision=float((held > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(held.mean()) / neighbours,
        coverage=float(covered.double().mean()),
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """The squared distance of each point to its k-th neighbour other than itself, [N]."""
    radii = []
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        distance = _squared_distances(block, points)
        distance[torch.arange(len(block)), start + torch.arange(len(block))] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    products = x @ y.T
    return (x.square().sum(1)[:, None] - 2 * products + y.square().sum(1)).clamp_min(0.0)
