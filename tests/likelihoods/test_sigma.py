"""Sigma and its state: closed forms, running averages, floors, the handover, and what a checkpoint must keep."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Laplace as TorchLaplace
from torch.distributions import Normal

from vaescale import noise
from vaescale.config import OneOf
from vaescale.likelihoods.base import LocationScale
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.likelihoods.sigma import floored
from vaescale.objectives.config import ElboConfig
from vaescale.objectives.elbo import Elbo

SHAPE = (2, 4, 4)
# Dimensions (images and values) that share one sigma.
SHARED_OVER = {
    "optimal": (0, 1, 2, 3),
    "optimal_per_image": (1, 2, 3),
    "optimal_per_channel": (0, 2, 3),
    "optimal_per_pixel": (0,),
}
FAMILIES = {"gaussian": Normal, "laplace": lambda mean, sigma: TorchLaplace(mean, sigma / math.sqrt(2))}
families = pytest.mark.parametrize("family", FAMILIES)
modes = pytest.mark.parametrize("mode", SHARED_OVER)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Images, and decoder outputs whose errors differ much between channels, pixels and images."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 2.5, 32).view(1, *SHAPE) * torch.linspace(0.5, 1.5, 6).view(-1, 1, 1, 1)
    return torch.rand(6, *SHAPE, generator=generator), spread * torch.randn(6, *SHAPE, generator=generator)


def build(family: str = "gaussian", *, shape: tuple[int, int, int] = SHAPE, **keys: Any) -> LocationScale:
    config = OneOf(LIKELIHOODS).validate({"kind": family, **keys})
    likelihood = config.implement(image_shape=shape)
    assert isinstance(likelihood, LocationScale)
    return likelihood.train()


def everything(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def step(likelihood: LocationScale, x: Tensor, params: Tensor, mask: Tensor | None = None) -> Tensor:
    value = likelihood.log_prob(x, params, everything(x) if mask is None else mask)
    likelihood.end_step()
    return value


def closed_form(family: str, error: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The maximum-likelihood standard deviation."""
    if family == "gaussian":
        return error.square().mean(dims, keepdim=True).sqrt()
    return math.sqrt(2) * error.abs().mean(dims, keepdim=True)


@families
@modes
def test_the_optimal_sigma_is_the_closed_form_and_beats_every_other(batch, family: str, mode: str) -> None:
    x, params = batch
    mean = torch.sigmoid(params.double())
    best = closed_form(family, x.double() - mean, SHARED_OVER[mode])
    value = step(build(family, sigma=mode), x, params)
    distribution = FAMILIES[family]
    expected = distribution(mean, best.expand_as(mean)).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        other = distribution(mean, factor * best.expand_as(mean)).log_prob(x.double()).sum()
        assert other < value.double().sum()


def test_optimal_beats_any_fixed_sigma_on_the_same_reconstructions(batch) -> None:
    x, params = batch
    best = step(build(sigma="optimal"), x, params).sum()
    for sigma in (1e-4, 0.05, 0.2, 0.3, 0.4, 0.5, 1.0, 3.0):
        assert step(build(sigma=sigma), x, params).sum() < best
    assert step(build(sigma="optimal_per_channel"), x, params).sum() > best
    assert step(build(sigma="optimal_per_pixel"), x, params).sum() > best


@families
@modes
def test_the_running_value_after_one_step_is_the_batch_s(batch, family: str, mode: str) -> None:
    x, params = batch
    likelihood = build(family, sigma=mode)
    step(likelihood, x, params)
    likelihood.eval()
    # Images share a running sigma, those with one each as well: evaluation of a draw has no image to fit it to.
    dims = (0, *SHARED_OVER[mode]) if mode == "optimal_per_image" else SHARED_OVER[mode]
    best = closed_form(family, x.double() - torch.sigmoid(params.double()), dims)
    torch.testing.assert_close(likelihood.state.evaluation_log_sigma(None).exp(), best, rtol=1e-6, atol=0)
    assert float(likelihood.sigma) == pytest.approx(float(best.square().mean().sqrt()), rel=1e-6)
    samples = likelihood.sample(params[:1].expand(4000, -1, -1, -1), noise.Stream(0, 0, torch.arange(4000)))
    torch.testing.assert_close(samples.std(0).double(), best[0].expand(SHAPE), rtol=0.1, atol=0)


def test_the_gradient_is_that_of_the_profile_likelihood(batch) -> None:
    """With sigma maximized out, the batch's log-likelihood is -(N D / 2) log(MSE) + const. Its gradient must come out
    although sigma is a constant for autograd.
    """
    x, params = (tensor.double() for tensor in batch)
    params.requires_grad_()
    step(build(sigma="optimal").double(), x, params).sum().backward()
    profile = -0.5 * x.numel() * (x - torch.sigmoid(params)).square().mean().log()
    (expected,) = torch.autograd.grad(profile, params)
    torch.testing.assert_close(params.grad, expected, rtol=1e-10, atol=1e-10)


@families
@modes
def test_a_kept_gradient_through_sigma_is_the_stopped_one(batch, family: str, mode: str) -> None:
    x, gradients = batch[0].double(), []
    for choice in ("stop", "keep"):
        params = batch[1].double().requires_grad_()
        step(build(family, sigma=mode, sigma_gradient=choice), x, params).sum().backward()
        gradients.append(params.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


def test_a_kept_gradient_is_finite_without_errors() -> None:
    x = torch.full((3, *SHAPE), 0.5)
    for mode in SHARED_OVER:
        params = torch.zeros_like(x).requires_grad_()
        step(build(sigma=mode, sigma_gradient="keep"), x, params).sum().backward()
        assert torch.isfinite(params.grad).all()


@modes
def test_padding_enters_nothing(batch, mode: str) -> None:
    x, params = batch
    mask = torch.tensor([True, True, True, True, False, False])
    padded, short = build(sigma=mode), build(sigma=mode)
    value = step(padded, x, params, mask)
    torch.testing.assert_close(value[:4], step(short, x[:4], params[:4]))
    torch.testing.assert_close(padded.state.running, short.state.running, rtol=1e-12, atol=0)
    spoiled = x.clone()
    spoiled[4:] = torch.nan
    again = build(sigma=mode)
    step(again, spoiled, params, mask)
    assert torch.equal(again.state.running, padded.state.running), "not even NaN"


def test_the_running_sigma_is_unbiased_from_the_first_step_and_averages_squares() -> None:
    likelihood = build(sigma="optimal", horizon_steps=10)
    x = torch.full((4, *SHAPE), 0.5)
    errors = [0.1, 0.2, 0.3]
    for number, error in enumerate(errors, start=1):
        step(likelihood, x, torch.logit(torch.full_like(x, 0.5 + error)))
        weights = [0.9 ** (number - 1 - i) for i in range(number)]
        expected = sum(w * e**2 for w, e in zip(weights, errors, strict=False)) / sum(weights)
        assert float(likelihood.sigma) == pytest.approx(math.sqrt(expected), rel=1e-6)


@modes
def test_micro_batches_are_pooled_into_one_update(batch, mode: str) -> None:
    x, params = batch
    whole, parts = build(sigma=mode), build(sigma=mode)
    step(whole, x, params)
    for part in (slice(0, 2), slice(2, 6)):
        parts.log_prob(x[part], params[part], everything(x[part]))
    parts.end_step()
    torch.testing.assert_close(whole.state.running, parts.state.running, rtol=1e-6, atol=0)


def test_each_micro_batch_has_its_own_sigma_or_all_the_running_one(batch) -> None:
    x, params = batch
    own, running = build(sigma="optimal"), build(sigma="optimal", sigma_source="running")
    step(own, x, params)
    step(running, x, params)
    before = float(running.sigma)
    assert before == pytest.approx(float(own.sigma), rel=1e-9)
    for part in (slice(0, 2), slice(2, 6)):
        error = (x[part] - torch.sigmoid(params[part])).double()
        for likelihood, sigma in ((own, error.square().mean().sqrt()), (running, before)):
            value = likelihood.log_prob(x[part], params[part], everything(x[part])).double()
            expected = Normal(0.0, sigma).log_prob(error).flatten(1).sum(1)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    own.end_step()
    running.end_step()
    torch.testing.assert_close(own.state.running, running.state.running, rtol=1e-9, atol=0)


def test_the_first_loss_of_a_running_sigma_is_that_of_the_initial_one(batch) -> None:
    x, params = batch
    value = step(build(sigma="optimal", sigma_source="running", initial_sigma=0.4), x, params)
    expected = Normal(torch.sigmoid(params), 0.4).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


@modes
def test_evaluation_leaves_the_state_and_takes_the_running_sigma(batch, mode: str) -> None:
    x, params = batch
    likelihood = build(sigma=mode)
    step(likelihood, x, params)
    before = likelihood.state.running.clone()
    likelihood.eval()
    other = x.flip(0)
    value = step(likelihood, other, params)
    assert torch.equal(likelihood.state.running, before)
    assert likelihood.reads_x == (mode == "optimal_per_image")
    if likelihood.reads_x:
        sigma = closed_form("gaussian", other.double() - torch.sigmoid(params.double()), (1, 2, 3))
    else:
        sigma = likelihood.state.evaluation_log_sigma(None).exp()
    expected = Normal(torch.sigmoid(params.double()), sigma.expand(6, *SHAPE)).log_prob(other.double())
    torch.testing.assert_close(value.double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-4)


@families
@modes
def test_the_floor_keeps_log_sigma_finite_and_distorts_nothing_above(family: str, mode: str) -> None:
    x = torch.full((4, *SHAPE), 0.5)
    likelihood = build(family, sigma=mode, sigma_floor=1e-3)
    assert torch.isfinite(step(likelihood, x, torch.zeros_like(x))).all()
    assert float(likelihood.sigma) == pytest.approx(1e-3)
    near = build(family, sigma=mode, sigma_floor=1e-3)
    step(near, x + 1e-2, torch.zeros_like(x))
    factor = math.sqrt(2) if family == "laplace" else 1
    assert float(near.sigma) == pytest.approx(factor * 1e-2, rel=1e-5)


def test_the_smooth_floor_of_learned_sigmas() -> None:
    floor = 1e-3
    for sigma in (1e-2, 0.1, 1.0):
        log_sigma = torch.tensor(math.log(sigma), dtype=torch.float64, requires_grad=True)
        assert float(floored(log_sigma, floor).exp().detach()) == pytest.approx(sigma, rel=3e-5)
    low = torch.tensor(
        [math.log(floor) - 1.0, math.log(floor) - 3.0], dtype=torch.float64, requires_grad=True
    )
    value = floored(low, floor)
    value.sum().backward()
    assert (value.detach() >= math.log(floor)).all()
    assert (low.grad > 0).all(), "a gradient leads back"
    # The reference code's soft clip, for the figure in the docstring.
    clipped = -6 + math.log1p(math.exp(-4 + 6))
    assert math.exp(clipped + 4) == pytest.approx(1.135, abs=1e-3)
    assert math.exp(-6 + math.log1p(math.exp(-2 + 6)) + 2) == pytest.approx(1.018, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("source", ["batch", "running"])
def test_non_finite_errors_never_enter_the_state(batch, bad: float, source: str) -> None:
    x, params = batch
    likelihood = build(sigma="optimal_per_pixel", sigma_source=source)
    step(likelihood, x, params)
    before = likelihood.state.running.clone()
    spoiled = x.clone()
    spoiled[0, 0, 0, 0] = bad
    step(likelihood, spoiled, params)
    assert torch.equal(likelihood.state.running, before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_the_state_stays_float64_when_the_model_is_cast(batch, cast: str) -> None:
    x, params = batch
    for keys in ({"sigma": "optimal"}, {"sigma": "predicted", "handover": {"at_step": 2}}):
        likelihood = build(**keys)
        step(likelihood, x, torch.cat([params, params], 1)[:, : likelihood.num_params(2)])
        before = {name: value.clone() for name, value in likelihood.named_buffers()}
        getattr(likelihood, cast)()
        for name, value in likelihood.named_buffers():
            assert value.dtype == torch.float64
            assert torch.equal(value, before[name])
        assert set(likelihood.state_dict()) >= set(before), "they are still buffers"


def test_shared_sigma_descends_to_the_optimal_one(batch) -> None:
    x, params = batch
    likelihood = build(sigma="shared")
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (-step(likelihood, x, params).mean()).backward()
        optimizer.step()
    best = closed_form("gaussian", x - torch.sigmoid(params), (0, 1, 2, 3))
    assert float(likelihood.sigma) == pytest.approx(float(best), rel=1e-3)


def handing_over(batch, steps: int, **keys: Any) -> tuple[LocationScale, list[Tensor]]:
    x, params = batch
    likelihood = build(sigma="predicted", **keys)
    raw = torch.full_like(params, -1.0)
    values = [step(likelihood, x, torch.cat([params, raw], 1)) for _ in range(steps)]
    return likelihood, values


def test_the_handover_by_step(batch) -> None:
    """Optimal until step 3, then log sigma moves in 4 equal steps to the predicted one."""
    x, params = batch
    likelihood, values = handing_over(batch, 9, handover={"at_step": 3, "ramp_steps": 4})
    log_optimal = closed_form("gaussian", x - torch.sigmoid(params), (0, 1, 2, 3)).log()
    log_predicted = math.log(0.25) - 1.0
    for number, value in enumerate(values):
        weight = min(max((number + 1 - 3) / 4, 0), 1)
        sigma = torch.exp((1 - weight) * log_optimal + weight * log_predicted).expand_as(x)
        expected = Normal(torch.sigmoid(params), sigma).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)
    assert likelihood.sigma is None
    variance = likelihood.eval().variance(torch.cat([params, torch.full_like(params, -1.0)], 1))
    torch.testing.assert_close(
        variance, torch.full_like(params, math.exp(2 * log_predicted)), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("horizon", [5, 100])
def test_the_handover_when_sigma_has_settled(horizon: int) -> None:
    """Errors that shrink by a fifth a window do not settle. Once they stand still, the second whole window says so: the
    running average, with its long tail, would need hundreds of steps more.
    """
    x = torch.full((4, *SHAPE), 0.5)
    rule = {"when_settled": 0.02, "ramp_steps": 10}
    likelihood = build(sigma="predicted", horizon_steps=horizon, handover=rule)

    def several(count: int, first: float, factor: float) -> float:
        for number in range(count):
            mean = torch.logit(torch.full_like(x, 0.5 + first * factor**number))
            step(likelihood, x, torch.cat([mean, torch.zeros_like(x)], 1))
        return float(likelihood.state.stage[1])

    assert several(3 * horizon, 0.4, 0.8 ** (1 / horizon)) == math.inf
    assert float(likelihood.progress["handover"]) == 0
    assert several(2 * horizon, 0.1, 1.0) == 5 * horizon
    assert several(9, 0.1, 1.0) == 5 * horizon, "once begun it goes on"
    assert float(likelihood.progress["handover"]) == 1


def test_a_step_that_is_not_finite_counts_but_settles_nothing() -> None:
    x = torch.full((4, *SHAPE), 0.5)
    rule = {"when_settled": 0.02, "ramp_steps": 10}
    likelihood = build(sigma="predicted", horizon_steps=3, handover=rule)
    mean = torch.logit(torch.full_like(x, 0.6))
    for number in range(6):
        step(likelihood, x + (torch.nan if number == 1 else 0), torch.cat([mean, torch.zeros_like(x)], 1))
    steps, start, log_sigma, *_ = likelihood.state.stage.tolist()
    assert (steps, start) == (6, 6)
    assert log_sigma == pytest.approx(math.log(0.1), abs=1e-5)


def test_in_the_ramp_a_kept_gradient_is_exact_and_a_stopped_one_takes_the_global_part_as_given(batch) -> None:
    x, params = (tensor.double() for tensor in batch)
    both = torch.cat([params, torch.full_like(params, -1.0)], 1).requires_grad_()
    rule = {"at_step": 1, "ramp_steps": 2}
    for gradient in ("keep", "stop"):
        likelihood = build(sigma="predicted", handover=rule, sigma_gradient=gradient)
        step(likelihood, x, both.detach())
        assert float(likelihood.progress["handover"]) == 0.5
        state = likelihood.state_dict()

        def summed(p: Tensor, likelihood=likelihood, state=state) -> Tensor:
            likelihood.load_state_dict(state)
            return likelihood.log_prob(x, p, everything(x)).sum()

        if gradient == "keep":
            assert torch.autograd.gradcheck(summed, (both,), eps=1e-6, atol=1e-4, rtol=1e-4)
        else:
            (found,) = torch.autograd.grad(summed(both), both)
            mean, raw = torch.sigmoid(both[:, :2]), both[:, 2:]
            best = closed_form("gaussian", x - mean, (0, 1, 2, 3)).detach().log()
            log_sigma = 0.5 * best + 0.5 * (math.log(0.25) + raw)
            by_hand = Normal(mean, log_sigma.exp()).log_prob(x).sum()
            torch.testing.assert_close(found, torch.autograd.grad(by_hand, both)[0], rtol=1e-8, atol=1e-8)


def test_a_batch_of_padding_alone_leaves_the_loss_finite(batch) -> None:
    x, params = batch
    for mode in SHARED_OVER:
        likelihood = build(sigma=mode)
        assert torch.isfinite(step(likelihood, x, params, torch.zeros(6, dtype=torch.bool))).all()


def test_the_handover_survives_a_checkpoint(batch) -> None:
    x, params = batch
    both = torch.cat([params, torch.full_like(params, -1.0)], 1)
    rule = {"when_settled": 0.02, "ramp_steps": 7}
    whole = build(sigma="predicted", horizon_steps=4, handover=rule)
    values = [step(whole, x, both) for _ in range(20)]
    first = build(sigma="predicted", horizon_steps=4, handover=rule)
    for _ in range(9):
        step(first, x, both)
    second = build(sigma="predicted", horizon_steps=4, handover=rule)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(step(second, x, both), value) for value in values[9:])


def test_beta_is_a_noise_level(batch, make_terms) -> None:
    """At sigma^2 = beta, beta (D / (2 beta) MSE + KL) = D/2 MSE + beta KL: the losses' gradients are proportional."""
    from vaescale.models.posterior import Gaussian, kl

    x, params = (tensor.double() for tensor in batch)
    stream = noise.Stream(0, 0, torch.arange(len(x)))
    for beta in (1e-3, 0.04, 1.0, 10.0):
        losses = []
        for sigma, weight in ((math.sqrt(beta), 1.0), (1.0, beta)):
            mean, mu = params.clone().requires_grad_(), params.flatten(1)[:, :3].clone().requires_grad_()
            log_px = step(build(sigma=sigma), x, mean)
            terms = make_terms(log_px=log_px, kl=kl(Gaussian(mu, 0.3 * mu)))
            loss = Elbo(ElboConfig(beta=weight), SimpleNamespace(group_places=(1,)))(terms, stream)[0]
            losses.append(torch.autograd.grad(loss, (mean, mu)))
        for at_sigma, at_beta in zip(*losses, strict=True):
            torch.testing.assert_close(beta * at_sigma, at_beta, rtol=1e-10, atol=1e-12)


REFUSED = {
    "needs sigma: predicted": {"sigma": "optimal", "handover": {"at_step": 3}},
    "exclude each other": {"sigma": "predicted", "handover": {"at_step": 3, "when_settled": 0.1}},
    "neither at_step nor when_settled is given": {"sigma": "predicted", "handover": {}},
    r"sigma_source \(=running\) has no meaning with": {
        "sigma": "optimal_per_image",
        "sigma_source": "running",
    },
    r"horizon_steps \(=7.0\) has no meaning with sigma: 0.5": {"sigma": 0.5, "horizon_steps": 7},
    r"sigma_gradient \(=keep\) has no meaning with sigma: shared": {
        "sigma": "shared",
        "sigma_gradient": "keep",
    },
    r"sigma_source \(=running\) has no meaning with sigma: predicted": {
        "sigma": "predicted",
        "sigma_source": "running",
    },
    r"initial_sigma \(=0.1\) has no meaning": {"sigma": 0.5, "initial_sigma": 0.1},
    r"sigma_floor \(=1.0\) must be below": {"sigma": "optimal", "sigma_floor": 1.0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_makes_no_sense_is_refused(words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        build(**REFUSED[words])
