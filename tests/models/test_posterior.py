"""Posteriors against what they say, value by value."""

import contextlib
import math
from decimal import Decimal, localcontext

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vaescale.config import OneOf
from vaescale.models import gaussians
from vaescale.models.config import POSTERIORS, Decreasing, FixedConfig, IsotropicConfig, RelativeConfig
from vaescale.models.posterior import Fixed, Gaussian, Isotropic, Relative, bounded, draw, kl
from vaescale.system import native


def raw(channels: int, *places: int) -> torch.Tensor:
    return torch.randn(5, channels, *places, generator=torch.Generator().manual_seed(0))


def test_isotropic_has_one_sigma_for_all_latents_of_a_place() -> None:
    for places in ((), (2, 3)):
        given = raw(IsotropicConfig().num_params(4), *places)
        q = Isotropic(IsotropicConfig(), 4)(given, None)
        assert q.mu.shape == q.log_sigma.shape == (5, 4, *places)
        assert torch.equal(q.mu, given[:, :4])
        assert torch.equal(q.log_sigma, bounded(given[:, 4:]).expand_as(q.mu))


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        ((1.0, 0.3, 0.2, 0.1), [1.0, 0.3, 0.2, 0.1]),
        (Decreasing(first=1.0, last=0.001), [1.0, 0.1, 0.01, 0.001]),
    ],
)
def test_fixed_sigmas(sigma, expected) -> None:
    config = FixedConfig(sigma=sigma)
    assert config.num_params(4) == 4
    given = raw(4, 2, 2)
    q = Fixed(config, 4)(given, None)
    assert torch.equal(q.mu, given)
    torch.testing.assert_close(q.log_sigma.exp()[3, :, 1, 0], torch.tensor(expected))
    expected_kl = kl_divergence(Normal(q.mu, q.log_sigma.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl(q), expected_kl)


def test_a_series_of_one_channel_is_its_first() -> None:
    assert FixedConfig(sigma=Decreasing(first=0.5, last=0.1)).sigmas(1) == [0.5]


def test_relative_is_the_prior_where_nothing_is_learned() -> None:
    prior = Gaussian(raw(3, 2, 2), 0.5 * raw(3, 2, 2))
    q = Relative(RelativeConfig(), 3)(torch.zeros(5, 6, 2, 2), prior)
    assert kl(q, prior).abs().max() == 0
    moved = torch.randn(5, 6, 2, 2)
    q = Relative(RelativeConfig(), 3)(moved, prior)
    shift, ratio = moved[:, :3], torch.exp(bounded(moved[:, 3:]))
    sigma = torch.exp(prior.log_sigma)
    # Vahdat & Kautz 2020, eq. 2.
    expected = 0.5 * (shift**2 / sigma**2 + ratio**2 - torch.log(ratio**2) - 1)
    torch.testing.assert_close(kl(q, prior), expected, rtol=1e-4, atol=1e-5)


def test_bounds_are_smooth_and_finite() -> None:
    far = torch.tensor([-1e6, -20.0, 0.0, 20.0, 1e6], requires_grad=True)
    out = bounded(far)
    assert out.abs().max() <= 8
    out[1:4].sum().backward()
    assert (far.grad[1:4] > 0).all()
    wild = Gaussian(torch.tensor([1e3]), bounded(torch.tensor([1e9])))
    assert math.isfinite(float(kl(wild, Gaussian(torch.zeros(1), bounded(torch.tensor([-1e9]))))))


@pytest.mark.parametrize(
    "refused", [{"sigma": []}, {"sigma": 0}, {"sigma": -1.0}, {"sigma": {"first": 1}}, {"sigma": "large"}]
)
def test_strange_sigmas_are_refused(refused) -> None:
    with pytest.raises(ValidationError):
        OneOf(POSTERIORS, default="diagonal").validate({"kind": "fixed", **refused})
    with pytest.raises(ValueError, match=r"posterior\.sigma has 2 numbers for network\.latent_dim"):
        FixedConfig(sigma=(1.0, 2.0)).sigmas(3)


def test_the_default_kind_is_diagonal() -> None:
    assert OneOf(POSTERIORS, default="diagonal").validate({}).kind == "diagonal"
    assert set(POSTERIORS) == {"diagonal", "isotropic", "fixed", "relative", "quantized", "finite_scalar"}


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4), (2, 3, 5, 9)], ids=["vector", "map", "odd map"])
@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("is_native", [False, True])
def test_a_draw_and_its_kl_are_those_of_the_plain_functions(
    shape: tuple[int, ...], has_prior: bool, is_native: bool
) -> None:
    """By torch's operations the values bit for bit, the gradients up to the order of their sums; by compiled functions up to rounding."""
    torch.manual_seed(0)
    # Each pair is a half of a map, as a network returns it.
    raw = torch.randn(2, shape[0], 2 * shape[1], *shape[2:])
    epsilon, weight = torch.randn(shape), torch.randn(shape)
    results = []
    for at_once in (False, True):
        leaves = raw.clone().requires_grad_()
        given, of_prior = (half.chunk(2, dim=1) for half in leaves)
        with contextlib.nullcontext() if is_native and at_once else native.switched_off():
            q = Gaussian(given[0], bounded(given[1]))
            p = Gaussian(of_prior[0], bounded(of_prior[1])) if has_prior else None
            if at_once:
                assert gaussians.take(*q) == (is_native and len(shape) == 4 and has_compiler())
                z, cost = draw(q, p, epsilon)
            else:
                z, cost = q.sample(epsilon), kl(q, p).flatten(2).sum(2) if len(shape) > 2 else kl(q, p)
            loss = (z * weight).sin().sum() + 0.3 * cost.square().sum()
            loss.backward()
        results.append((z, cost, leaves.grad))
    (*values, gradient), (*others, other) = results
    for value, expected in zip(others, values, strict=True):
        torch.testing.assert_close(
            value, expected, rtol=2e-6 if is_native else 0, atol=2e-6 if is_native else 0
        )
    atol = (3e-6 if is_native else 1e-6) * float(gradient.abs().max())
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=atol)
    assert other[0].abs().min() > 0


def has_compiler() -> bool:
    return native.load(gaussians.SOURCE) is not None


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler and GNU OpenMP")
def test_a_compiled_draw_keeps_what_is_small_and_what_is_not_finite() -> None:
    def pair(mu: list[float], log_sigma: list[float]) -> list[Tensor]:
        return [torch.tensor(row).view(-1, 1, 1, 1) for row in (mu, log_sigma)]

    nan, inf = math.nan, math.inf
    q, p = (
        pair([1e-3, 0.0, 0.0, nan, 0.0, 0.0], [0.0, 1e-4, -3.0, 0.0, nan, 60.0]),
        pair([0.0] * 6, [0.0] * 6),
    )
    z, cost = gaussians.draw(*q, *p, torch.ones(6, 1, 1, 1))
    expected = kl(*(Gaussian(*(x.double() for x in one)) for one in (q, p))).flatten(1)
    torch.testing.assert_close(cost[:3].double(), expected[:3], rtol=1e-6, atol=0)
    assert cost[3:5].isnan().all()
    assert z[3:5].isnan().all()
    assert cost[5] == inf
    rest = torch.tensor([-inf, -100.0, -1e-6, 1e-6, 7.5, inf, nan]).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        gaussians.bounded(rest).double(), 8 * torch.tanh(rest.double() / 8), rtol=3e-7, atol=0, equal_nan=True
    )


def test_gradients_of_a_draw_are_finite_differences() -> None:
    torch.manual_seed(0)
    mu, log_sigma, mu_p, log_sigma_p, epsilon = torch.randn(5, 2, 3, 2, 2, dtype=torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (mu, log_sigma, mu_p, log_sigma_p))

    def both(mu: Tensor, log_sigma: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        return draw(Gaussian(mu, bounded(log_sigma)), Gaussian(*prior) if prior else None, epsilon)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradcheck(both, inputs[:2])


@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("has_prior", [False, True])
def test_the_kl_of_latents_near_the_prior_keeps_its_digits(distance: float, has_prior: bool) -> None:
    """Float32 against (d^2 + r^2 - 1) / 2 - log r of the same numbers with 50 digits, where d and log r are tiny; never negative."""
    torch.manual_seed(0)
    mu, log_sigma = distance * torch.randn(2, 50, 2)
    prior = torch.randn(2, 50, 2) if has_prior else torch.zeros(2, 50, 2)
    q = Gaussian(prior[0] + mu, prior[1] + log_sigma)
    p = Gaussian(*prior) if has_prior else None
    _, cost = draw(q, p, torch.randn(50, 2))
    assert torch.equal(cost, kl(q, p))
    assert (cost >= 0).all()
    expected = [
        _exact_kl(*numbers) for numbers in zip(*(t.flatten().tolist() for t in (*q, *prior)), strict=True)
    ]
    torch.testing.assert_close(cost.flatten().double(), torch.tensor(expected).double(), rtol=2e-6, atol=0)


def _exact_kl(mu: float, log_sigma: float, mu_p: float, log_sigma_p: float) -> float:
    with localcontext() as context:
        context.prec = 50
        ratio = Decimal(log_sigma) - Decimal(log_sigma_p)
        squared = ((Decimal(mu) - Decimal(mu_p)) / Decimal(log_sigma_p).exp()) ** 2
        return float((squared + (2 * ratio).exp() - 1) / 2 - ratio)
