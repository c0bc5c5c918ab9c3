"""The Gaussian decoder against torch.distributions, finite differences and the closed form of its sigma."""

import math

import pytest
import torch
from torch.distributions import Normal

from vaescale import noise
from vaescale.likelihoods.gaussian import Gaussian, GaussianConfig

SHAPE = (6, 2, 4, 4)
DIMENSIONS = 2 * 4 * 4


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def everything(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def after_one_step(batch: tuple[torch.Tensor, torch.Tensor]) -> Gaussian:
    """An optimal-sigma likelihood in training mode that has seen the batch."""
    likelihood = Gaussian(GaussianConfig()).train()
    x, params = batch
    likelihood.log_prob(x, params, everything(x))
    likelihood.end_step()
    return likelihood


def reference(x: torch.Tensor, params: torch.Tensor, sigma: float) -> torch.Tensor:
    return Normal(torch.sigmoid(params.double()), sigma).log_prob(x.double()).flatten(1).sum(1)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0, 3.0])
def test_fixed_sigma_agrees_with_torch(batch, sigma: float) -> None:
    x, params = batch
    likelihood = Gaussian(GaussianConfig(sigma=sigma))
    torch.testing.assert_close(
        likelihood.log_prob(x, params, everything(x)).double(),
        reference(x, params, sigma),
        rtol=1e-5,
        atol=1e-4,
    )
    assert float(likelihood.sigma) == sigma


def test_the_density_integrates_to_one() -> None:
    likelihood = Gaussian(GaussianConfig(sigma=0.2))
    x = torch.linspace(-2, 3, 20001).view(-1, 1, 1, 1)
    density = likelihood.log_prob(x, torch.zeros_like(x), everything(x)).double().exp()
    assert float(torch.trapezoid(density, x.flatten().double())) == pytest.approx(1, abs=1e-5)


def test_optimal_is_the_closed_form_and_beats_every_fixed_sigma(batch) -> None:
    x, params = batch
    likelihood = Gaussian(GaussianConfig(sigma="optimal")).train()
    best = likelihood.log_prob(x, params, everything(x)).sum()
    likelihood.end_step()
    closed_form = (x - torch.sigmoid(params)).double().square().mean().sqrt()
    assert float(likelihood.sigma) == pytest.approx(float(closed_form), rel=1e-6)
    assert float(best) == pytest.approx(float(reference(x, params, float(closed_form)).sum()), rel=1e-5)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert reference(x, params, factor * float(closed_form)).sum() < best.double()


def test_the_gradient_is_that_of_the_profile_likelihood(batch) -> None:
    """With sigma maximized out, the batch's log-likelihood is -(N D / 2) log(MSE) + const. Its gradient must come out
    although sigma is a constant for autograd.
    """
    x, params = (tensor.double() for tensor in batch)

    def profile(p: torch.Tensor) -> torch.Tensor:
        return -0.5 * x.numel() * (x - torch.sigmoid(p)).square().mean().log()

    params.requires_grad_()
    likelihood = Gaussian(GaussianConfig(sigma="optimal")).train()
    likelihood.mean = torch.sigmoid  # float64, for finite differences
    likelihood.log_prob(x, params, everything(x)).sum().backward()
    step = 1e-6
    for place in [(0, 0, 0, 0), (2, 1, 3, 1), (5, 0, 2, 2)]:
        shift = torch.zeros_like(params)
        shift[place] = step
        with torch.no_grad():
            slope = (profile(params + shift) - profile(params - shift)) / (2 * step)
        assert float(params.grad[place]) == pytest.approx(float(slope), rel=1e-5)


def test_padding_does_not_enter_sigma(batch) -> None:
    x, params = batch
    mask = torch.tensor([True, True, True, True, False, False])
    padded = Gaussian(GaussianConfig()).train()
    padded.log_prob(x, params, mask)
    padded.end_step()
    short = Gaussian(GaussianConfig()).train()
    short.log_prob(x[:4], params[:4], mask[:4])
    short.end_step()
    assert torch.equal(padded.running, short.running)


def test_running_sigma_is_unbiased_from_the_first_step_and_averages_squares() -> None:
    likelihood = Gaussian(GaussianConfig(horizon_steps=10)).train()
    x = torch.full((4, 1, 2, 2), 0.5)
    errors = [0.1, 0.2, 0.3]
    for number, error in enumerate(errors, start=1):
        mean = torch.full_like(x, 0.5 + error)
        likelihood.log_prob(x, torch.logit(mean), everything(x))
        likelihood.end_step()
        weights = [0.9 ** (number - 1 - i) for i in range(number)]
        expected = sum(w * e**2 for w, e in zip(weights, errors, strict=False)) / sum(weights)
        assert float(likelihood.sigma) == pytest.approx(math.sqrt(expected), rel=1e-6)


def test_micro_batches_are_pooled_into_one_update(batch) -> None:
    x, params = batch
    whole, parts = Gaussian(GaussianConfig()).train(), Gaussian(GaussianConfig()).train()
    whole.log_prob(x, params, everything(x))
    for part in (slice(0, 2), slice(2, 6)):
        parts.log_prob(x[part], params[part], everything(x[part]))
    whole.end_step()
    parts.end_step()
    torch.testing.assert_close(whole.running, parts.running, rtol=1e-6, atol=0)


def test_evaluation_uses_the_running_sigma_and_leaves_it(batch) -> None:
    x, params = batch
    likelihood = after_one_step(batch)
    before = likelihood.running.clone()
    likelihood.eval()
    other = x.flip(0)
    value = likelihood.log_prob(other, params, everything(x))
    likelihood.end_step()
    assert torch.equal(likelihood.running, before)
    expected = reference(other, params, float(likelihood.sigma))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_floor_keeps_log_sigma_finite_and_distorts_nothing_above() -> None:
    likelihood = Gaussian(GaussianConfig(sigma_floor=1e-3)).train()
    x = torch.full((4, 1, 2, 2), 0.5)
    perfect = likelihood.log_prob(x, torch.zeros_like(x), everything(x))
    likelihood.end_step()
    assert torch.isfinite(perfect).all()
    assert float(likelihood.sigma) == pytest.approx(1e-3)
    near = Gaussian(GaussianConfig(sigma_floor=1e-3)).train()
    near.log_prob(x + 1e-2, torch.zeros_like(x), everything(x))
    near.end_step()
    assert float(near.sigma) == pytest.approx(1e-2, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_errors_never_enter_the_state(batch, bad: float) -> None:
    x, params = batch
    likelihood = after_one_step(batch)
    before = likelihood.running.clone()
    likelihood.log_prob(x + bad, params, everything(x))
    likelihood.end_step()
    assert torch.equal(likelihood.running, before)


def test_samples_have_the_model_s_moments(batch) -> None:
    _, params = batch
    likelihood = Gaussian(GaussianConfig(sigma=0.25))
    count = 40000
    stream = noise.Stream(0, 0, torch.arange(count))
    samples = likelihood.sample(params[:1].expand(count, -1, -1, -1), stream)
    error = 0.25 / math.sqrt(count)
    torch.testing.assert_close(samples.mean(0), torch.sigmoid(params[0]), rtol=0, atol=5 * error)
    torch.testing.assert_close(samples.std(0), torch.full(SHAPE[1:], 0.25), rtol=0.03, atol=0)


def test_bf16_parameters_are_reduced_in_float32(batch) -> None:
    x, params = batch
    likelihood = Gaussian(GaussianConfig(sigma=0.1))
    value = likelihood.log_prob(x, params.bfloat16(), everything(x))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference(x, params.bfloat16(), 0.1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_the_state_stays_float64_when_the_model_is_cast(batch, cast: str) -> None:
    likelihood = after_one_step(batch)
    before = likelihood.running.clone()
    getattr(likelihood, cast)()
    assert likelihood.running.dtype == torch.float64
    assert torch.equal(likelihood.running, before)
