"""How far samples are from images, by the features of both [N, F]: a kernel's distance, and how the two sets overlap.

    kernel distance     the squared maximum mean discrepancy of k(x, y) = (x . y / F + 1)^3, unbiased    Binkowski et al. 2018
    precision, recall   samples within the images' manifold, images within the samples': a manifold is the balls around its
                        points that reach to their k-th neighbours                                       Kynkaanniemi et al. 2019
    density, coverage   how many images' balls hold a sample, over k; images whose ball holds a sample   Naeem et al. 2020

The Frechet distance is in `frechet.py`. All in float64, block by block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 2000


class Overlap(NamedTuple):
    """Shares of samples or images, in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def kernel_distance(images: Tensor, samples: Tensor) -> float:
    """The unbiased kernel distance of images [N, F] and samples [M, F], at least two each.

    It can be a little below 0 for equal distributions.
    """
    size = images.shape[1]

    def total(one: Tensor, other: Tensor) -> Tensor:
        parts = torch.split(one.double(), BLOCK)
        return torch.stack([((part @ other.double().T) / size + 1).pow(3).sum() for part in parts]).sum()

    def within(one: Tensor) -> Tensor:
        own = (one.double().square().sum(1) / size + 1).pow(3).sum()  # each with itself
        return (total(one, one) - own) / (len(one) * (len(one) - 1))

    between = total(images, samples) / (len(images) * len(samples))
    return float(within(images) + within(samples) - 2 * between)


def overlap(images: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> Overlap:
    """Precision, recall, density and coverage of images [N, F] and samples [M, F], more than `neighbours` each."""
    image_radii, sample_radii = (_radii(one, neighbours) for one in (images, samples))
    held = torch.zeros(len(samples), dtype=torch.float64)  # by how many images' balls each sample is
    recalled, covered = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
    for start in range(0, len(images), BLOCK):
        here = slice(start, start + BLOCK)
        distance = _squared_distances(images[here], samples)
        inside = distance <= image_radii[here, None]
        held += inside.sum(0)
        covered[here] = inside.any(1)
        recalled[here] = (distance <= sample_radii).any(1)
    return Overlap(
        precision=float((held > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(held.mean()) / neighbours,
        coverage=float(covered.double().mean()),
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """The squared distance to each point's k-th neighbour, itself left out, [N]."""
    radii = []
    for start in range(0, len(points), BLOCK):
        here = points[start : start + BLOCK]
        distance = _squared_distances(here, points)
        distance[torch.arange(len(here)), start + torch.arange(len(here))] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _squared_distances(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double(), other.double()
    products = one @ other.T
    return (one.square().sum(1)[:, None] - 2 * products + other.square().sum(1)).clamp_min(0.0)
