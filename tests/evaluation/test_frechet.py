"""The Frechet distance of known Gaussians, against scipy's matrix root; moments merged over batches and ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from tests.ranks import on_ranks
from vaescale.evaluation.frechet import Moments, frechet_distance, moments


def features(seed: int, count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) @ mixing + 100 + seed


def test_moments_are_numpy_s_whatever_the_batches() -> None:
    whole = features(0)
    for size in (1, 7, 200):
        found = moments(torch.split(whole, size))
        np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(whole.numpy().T), rtol=1e-10)
        assert found.images == 200


def test_the_distance_is_scipy_s() -> None:
    one, other = (moments([features(seed)]) for seed in (0, 1))
    root = sqrtm(one.covariance.numpy() @ other.covariance.numpy()).real
    wanted = (
        ((one.mean - other.mean) ** 2).sum()
        + one.covariance.trace()
        + other.covariance.trace()
        - 2 * root.trace()
    )
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_one_dimension_is_the_closed_form() -> None:
    one = Moments(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double(), 10)
    other = Moments(torch.tensor([4.0]).double(), torch.tensor([[9.0]]).double(), 10)
    assert frechet_distance(one, other) == pytest.approx(3.0**2 + (2 - 3) ** 2)


def test_a_flat_direction_is_no_fault() -> None:
    flat = features(0)
    flat[:, 2] = 7.0
    assert frechet_distance(moments([flat]), moments([features(1)])) > 0


def _on_rank(rank: int, ranks: int) -> Tensor:
    found = moments(torch.split(features(0)[rank::ranks], 9))
    return torch.cat([found.mean, found.covariance.flatten()])


def test_empty_batches_are_passed_over() -> None:
    empty, whole = features(0)[:0], features(0)
    found, wanted = moments([empty, whole[:50], empty, whole[50:]]), moments([whole])
    torch.testing.assert_close(found.covariance, wanted.covariance)
    assert found.images == 200


@pytest.mark.distributed
def test_ranks_merge_exactly(tmp_path: Path) -> None:
    wanted = moments([features(0)])
    for other in on_ranks(tmp_path, _on_rank):
        torch.testing.assert_close(other, torch.cat([wanted.mean, wanted.covariance.flatten()]))
