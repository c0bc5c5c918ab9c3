"""Means of discretized logistics against sums over all levels, in float64."""

import math

import pytest
import torch
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.likelihoods.discretized_logistic import log_level_mass
from vaescale.likelihoods.level_means import chained_means, level_mean

LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def enumerated(means: Tensor, log_scales: Tensor, coefficients: Tensor) -> Tensor:
    """The means of three channels, as sums over all levels of those before with the likelihood's masses.

    The third given the others is its `level_mean`, which is compared with sums below.
    """

    def masses(mean: Tensor, channel: int) -> Tensor:
        return log_level_mass(LEVELS, mean[..., None], log_scales[channel].expand_as(mean)[..., None]).exp()

    first = masses(means[0], 0)
    second = first[:, None] * masses(means[1] + coefficients[0] * LEVELS, 1)
    expected = [(first * LEVELS).sum(), (second * LEVELS).sum()]
    third = level_mean(
        means[2] + coefficients[1] * LEVELS[:, None] + coefficients[2] * LEVELS, log_scales[2].exp()
    )
    return torch.stack([*expected, (second * third).sum()])


@pytest.mark.parametrize(
    ("means", "scales", "coefficients"),
    [
        ((0.1, -0.2, 0.3), (0.05, 0.03, 0.02), (0.9, 0.4, -0.8)),
        ((-0.9, 0.95, 0.0), (0.2, 0.25, 0.001), (1.0, 1.0, 1.0)),  # clipped on both sides, then a kink
        ((0.4, -0.5, -0.1), (0.001, 0.001, 0.001), (0.5, -0.7, 0.3)),  # an eighth of a level: rounding alone
        ((0.7, -1.4, 2.5), (20.0, 0.5, 0.1), (-1.0, 0.99, -0.99)),
        ((-0.97, -0.6, -0.8), (0.03, 0.1, 0.004), (0.99, -0.9, 0.95)),
    ],
)
def test_a_chain_s_means_are_the_sums_over_all_levels(
    means: tuple[float, ...], scales: tuple[float, ...], coefficients: tuple[float, ...]
) -> None:
    m, s, c = (torch.tensor(values, dtype=torch.float64) for values in (means, scales, coefficients))
    expected = enumerated(m, s.log(), c)
    for dtype in (torch.float64, torch.float32):
        value = chained_means(m[None].to(dtype), s.log()[None].to(dtype), c[None].to(dtype))[0].double()
        error = (value - expected).abs() / 2  # on [0, 1]
        assert error[0] < 1e-4
        assert error.max() < 0.003


@pytest.mark.parametrize("scale", [math.exp(-7), 0.0015, 0.0016, 0.003, 0.01, 0.1, 1.0, 20.0])
def test_a_level_mean_is_the_sum_over_the_levels(scale: float) -> None:
    mean = torch.cat([torch.linspace(-1.5, 1.5, 401), torch.tensor([-500.0, -5, 5, 500])]).double()
    log_scale = torch.full_like(mean, math.log(scale))[:, None]
    expected = log_level_mass(LEVELS, mean[:, None], log_scale).exp() @ LEVELS
    for dtype in (torch.float64, torch.float32):
        value = level_mean(mean.to(dtype), torch.tensor(scale, dtype=dtype)).double()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_mixture_s_mean_is_the_mean_of_its_draws(channels: int) -> None:
    """Where clipping decides: in wide components with strong coefficients. More than ROWS rows are taken in several pieces."""
    likelihood = OneOf(LIKELIHOODS).validate({"kind": "discretized_logistic_mixture", "components": 2})
    mixture = likelihood.implement(image_shape=(channels, 2, 2)).eval()
    torch.manual_seed(channels)
    params = 1.5 * torch.randn(1, mixture.num_params(channels), 2, 2)
    draws = mixture.sample(params.expand(10_000, -1, -1, -1), noise.Stream(0, 0, torch.arange(10_000)))
    error = draws.double().std(0) / math.sqrt(len(draws))
    mean = mixture.mean(params)[0].double()
    assert ((draws.double().mean(0) - mean).abs() < 5 * error + (1e-4 if channels == 1 else 0.003)).all()
    many = mixture.mean(params.expand(300, -1, -1, -1))  # 2,400 rows
    assert torch.equal(many[-1], many[0])
