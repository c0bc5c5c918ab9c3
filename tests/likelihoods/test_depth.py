"""Likelihoods of images with another depth than 8 bits: masses over 4,096 and 65,536 levels, densities of true steps."""

import math
from typing import Any

import mpmath
import pytest
import torch

from vaescale import noise
from vaescale.config import OneOf, Window
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.likelihoods.discretized_logistic import log_level_mass
from vaescale.likelihoods.level_means import level_mean

DEEP = Window("uint16", 0, 65535)
HALF_LEVEL = 1 / 65535
NARROWEST = HALF_LEVEL / 4  # an eighth of a level


def built(shape: tuple[int, int, int] = (1, 1, 1), window: Window = DEEP, **keys: Any) -> Likelihood:
    likelihood: Likelihood = OneOf(LIKELIHOODS).validate(keys).seen_in(window).implement(image_shape=shape)
    return likelihood.eval()


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "bitwise"},
        {"kind": "discretized_logistic"},
        {"kind": "discretized_logistic", "scale": 0.001},
        {"kind": "discretized_logistic_mixture", "components": 3},
    ],
    ids=["bitwise", "logistic", "fixed", "mixture"],
)
@pytest.mark.parametrize("window", [DEEP, Window("int16", -1024, 3071)], ids=["65536", "4096"])
def test_masses_sum_to_one_in_float32_and_are_drawn_from(keys: dict[str, Any], window: Window) -> None:
    likelihood = built(window=window, **keys)
    levels = window.levels
    assert levels is not None
    x = torch.arange(levels, dtype=torch.float32).view(-1, 1, 1, 1) / (levels - 1)
    for seed, size in ((0, 1.0), (1, 3.0), (2, 20.0)):  # the last one at the ends, with scales at both bounds
        generator = torch.Generator().manual_seed(seed)
        params = size * torch.randn(1, likelihood.num_params(1), 1, 1, generator=generator)
        log_mass = likelihood.log_prob(x, params.expand(levels, -1, -1, -1), everything(levels))
        mass = log_mass.double().exp()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-4), size
        mean = float((x.flatten().double() * mass).sum())
        assert float(likelihood.mean(params)) == pytest.approx(mean, abs=1e-4)
        slots = torch.arange(4000)
        drawn = likelihood.sample(params.expand(4000, -1, -1, -1), noise.Stream(0, 0, slots)).double()
        assert ((drawn * (levels - 1)) - (drawn * (levels - 1)).round()).abs().max() < 0.01, "levels"
        assert float(drawn.mean()) == pytest.approx(mean, abs=5 * float(drawn.std()) / 63 + 1e-4)


@pytest.mark.parametrize("scale", [NARROWEST, 2e-5, 1e-3, 0.25, 20.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.1, 1.0, 1.5])
def test_masses_of_tiny_bins_agree_with_fifty_digits(scale: float, mean: float) -> None:
    """In float64, at the ends and around the mean; in float32 as far as the mean itself is known there: a hundredth of a level."""
    near = round((mean + 1) / 2 * 65535)
    numbers = sorted({0, 1, 65534, 65535, *(min(max(near + step, 0), 65535) for step in (-40, -1, 0, 1, 3))})
    with mpmath.workdps(50):
        m, s, h = mpmath.mpf(mean), mpmath.mpf(scale), mpmath.mpf(1) / 65535

        def survival(edge: Any) -> Any:
            return 1 / (1 + mpmath.exp((edge - m) / s))

        expected = []
        for number in numbers:
            v = 2 * number * h - 1
            upper = 0 if number == 65535 else survival(v + h)
            lower = 1 if number == 0 else survival(v - h)
            expected.append(float(mpmath.log(lower - upper)) if lower != upper else -math.inf)
    v = 2 * torch.tensor(numbers, dtype=torch.float64) / 65535 - 1
    means, log_scales = torch.full_like(v, mean), torch.full_like(v, math.log(scale))
    value = log_level_mass(v, means, log_scales, 65536)
    known = [number for number, log_mass in enumerate(expected) if log_mass > -100]  # 1e-43 of 50 digits
    exact = torch.tensor(expected, dtype=torch.float64)[known]
    torch.testing.assert_close(value[known], exact, rtol=1e-8, atol=1e-8)
    narrow = log_level_mass(v.float(), means.float(), log_scales.float(), 65536).double()
    torch.testing.assert_close(narrow[known], exact, rtol=1e-5, atol=0.01 * 2 * HALF_LEVEL / scale + 1e-4)


@pytest.mark.parametrize("kind", ["discretized_logistic", "discretized_logistic_mixture", "bitwise"])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_extreme_outputs_leave_finite_gradients(kind: str, size: float) -> None:
    likelihood = built((2, 2, 2), kind=kind)
    generator = torch.Generator().manual_seed(0)
    for sign in (size, -size):
        params = sign * torch.rand(4, likelihood.num_params(2), 2, 2, generator=generator)
        params.requires_grad_()
        x = torch.randint(0, 65536, (4, 2, 2, 2), generator=generator) / 65535
        x[0], x[1] = 0.0, 1.0
        value = likelihood.log_prob(x, params, everything(4))
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert params.grad is not None
        assert torch.isfinite(params.grad).all()


@pytest.mark.parametrize("scale", [NARROWEST, 2e-6, 1e-5, 0.01, 0.5])
def test_a_level_mean_is_the_sum_over_65536_levels(scale: float) -> None:
    v = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    for mean in (-1.2, -0.99997, 0.30001, 1.0):
        m, log_scale = torch.full_like(v, mean), torch.full_like(v, math.log(scale))
        expected = float((log_level_mass(v, m, log_scale, 65536).exp() * v).sum())
        for dtype in (torch.float64, torch.float32):
            value = level_mean(torch.tensor(mean, dtype=dtype), torch.tensor(scale, dtype=dtype), 65536)
            assert float(value) == pytest.approx(expected, abs=2e-5)


def test_dequantized_densities_have_the_true_step() -> None:
    """A Gaussian much wider than a level: E log p(x + u) - log L is the log mass of the level's cell."""
    window = Window("int16", -1000, 999)
    likelihood = built(window=window, kind="gaussian", sigma=0.02, dequantize=True)
    assert likelihood.added_bits == pytest.approx(math.log2(2000))
    count, level = 5000, 1010
    x = torch.full((count, 1, 1, 1), level / 1999)
    target = likelihood.target(x, noise.Stream(0, 0, torch.arange(count)))
    assert level / 2000 <= float(target.min()) <= float(target.max()) < (level + 1) / 2000
    assert float(likelihood.expected_target(x)[0]) == pytest.approx((level + 0.5) / 2000, abs=1e-7)
    params = torch.zeros(count, 1, 1, 1)
    bound = float(likelihood.log_prob(target, params, everything(count)).double().mean()) - math.log(2000)
    normal = torch.distributions.Normal(torch.tensor(0.5).double(), 0.02)
    edges = torch.tensor([level, level + 1]).double() / 2000
    assert bound == pytest.approx(float(normal.cdf(edges).diff().log()), abs=1e-4)


def test_a_depth_adds_its_own_bits() -> None:
    assert built(kind="gaussian").added_bits == 16
    assert built(kind="bitwise").added_bits == 0
    assert built(window=Window(), kind="gaussian").added_bits == 8
    assert built(window=Window("float32", -1, 1), kind="gaussian").added_bits is None
    assert built(window=Window("float32", -1, 1), kind="bernoulli").levels == 2
