"""What every likelihood promises: it sums or integrates to one, draws what it says, and has the gradient of its value."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.errors import UserError
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.likelihoods.continuous_bernoulli import log_density, mean
from vaescale.likelihoods.structured_gaussian import offsets_after

CASES: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "gaussian", "sigma": 0.2},
    "unbounded mean": {"kind": "gaussian", "sigma": 0.3, "mean": "identity"},
    "shared": {"kind": "gaussian", "sigma": "shared"},
    "optimal": {"kind": "gaussian", "sigma": "optimal"},
    "optimal_per_channel": {"kind": "gaussian", "sigma": "optimal_per_channel"},
    "optimal_per_pixel": {"kind": "gaussian", "sigma": "optimal_per_pixel"},
    "predicted": {"kind": "gaussian", "sigma": "predicted"},
    "handover": {"kind": "gaussian", "sigma": "predicted", "handover": {"at_step": 3}},
    "structured": {"kind": "structured_gaussian"},
    "structured, 5x5": {"kind": "structured_gaussian", "radius": 2},
    "laplace": {"kind": "laplace", "sigma": 0.3},
    "laplace, predicted": {"kind": "laplace", "sigma": "predicted"},
    "student": {"kind": "student_t"},
    "student, shared": {"kind": "student_t", "scale": "shared", "degrees_of_freedom": "shared"},
    "student, fixed": {"kind": "student_t", "scale": 0.1, "degrees_of_freedom": 5},
    "student, one predicted": {"kind": "student_t", "scale": "predicted", "degrees_of_freedom": 3.5},
    "continuous_bernoulli": {"kind": "continuous_bernoulli"},
    "bernoulli": {"kind": "bernoulli"},
    "categorical": {"kind": "categorical"},
    "bitwise": {"kind": "bitwise"},
    "logistic": {"kind": "discretized_logistic"},
    "logistic, shared": {"kind": "discretized_logistic", "scale": "shared"},
    "logistic, fixed": {"kind": "discretized_logistic", "scale": 0.05},
    "mixture": {"kind": "discretized_logistic_mixture", "components": 3},
    "autoregressive": {
        "kind": "autoregressive_logistic_mixture",
        "components": 2,
        "radius": 1,
        "width": 6,
        "blocks": 1,
    },
}
SHAPE = (3, 3, 4)
SHAPES = {
    "categorical": (3, 1, 2)
}  # 256 outputs for each value: 36 values would take ten times as long as any other
DRAWS = 30_000


def build(name: str, shape: tuple[int, int, int] | None = None) -> Likelihood:
    config = OneOf(LIKELIHOODS).validate(CASES[name])
    likelihood = config.implement(image_shape=shape or SHAPES.get(name, SHAPE)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(likelihood.parameters()):
            parameter += 0.3 * number - 0.2  # not where all begin
    return likelihood


def decoded(likelihood: Likelihood, count: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    channels, height, width = likelihood.image_shape
    generator = torch.Generator().manual_seed(seed)
    shape = (count, likelihood.num_params(channels), height, width)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def images(likelihood: Likelihood, count: int) -> Tensor:
    """In the likelihood's own support, float64."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (count, *likelihood.image_shape), generator=generator)
    x = levels.double() / 255
    return (x > 0.5).double() if kind(likelihood) == "bernoulli" else x


def kind(likelihood: Likelihood) -> str:
    return str(likelihood.config.kind)


def everything(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def stream(count: int, *, start: int = 0) -> noise.Stream:
    return noise.Stream(0, 0, torch.arange(start, start + count))


def test_every_kind_is_here() -> None:
    assert {case["kind"] for case in CASES.values()} == set(LIKELIHOODS)


ONE_VALUE = [name for name in CASES if not name.startswith("structured")]


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_sums_or_integrates_to_one(name: str) -> None:
    likelihood = build(name, (1, 1, 1))
    for seed in range(4):
        _, weights = support(likelihood, decoded(likelihood, 1, scale=2.0, seed=seed))
        assert float(weights.sum()) == pytest.approx(1, abs=2e-5), seed


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_is_drawn_with_its_distribution(name: str) -> None:
    """The empirical distribution function against the sums of the density or mass: Kolmogorov's distance."""
    likelihood = build(name, (1, 1, 1))
    for seed in range(2):
        params = decoded(likelihood, 1, scale=1.5, seed=seed)
        points, weights = support(likelihood, params)
        draws = likelihood.sample(params.float().expand(DRAWS, -1, -1, -1), stream(DRAWS)).double().flatten()
        if likelihood.measure == "mass":
            assert torch.isin((draws * 255).round(), (points * 255).round()).all(), "in the support"
            torch.testing.assert_close(draws, (draws * 255).round() / 255, rtol=0, atol=1e-6)
        expected = weights.cumsum(0)
        drawn = torch.searchsorted(draws.sort().values, points + 1e-4, right=True) / DRAWS
        slack = (
            1e-4 * float((weights / points.diff().abs().min()).max())
            if likelihood.measure == "density"
            else 0
        )
        assert float((drawn - expected).abs().max()) < 1.95 / math.sqrt(DRAWS) + min(slack, 0.01), seed


def support(likelihood: Likelihood, params: Tensor) -> tuple[Tensor, Tensor]:
    """All values of one pixel and their masses; for a density a grid, fine around the mean and reaching far, since heavy
    tails have mass at a distance of 100.
    """
    if likelihood.measure == "mass":
        x = torch.linspace(0, 1, likelihood.levels, dtype=torch.float64)
    elif kind(likelihood) == "continuous_bernoulli":
        x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    else:
        x = (
            float(likelihood.mean(params))
            + torch.sinh(torch.linspace(-8, 8, 400_001, dtype=torch.float64)) * 0.2
        )
    points = x.view(-1, 1, 1, 1)
    value = likelihood.log_prob(points, params.expand(len(x), -1, -1, -1), everything(x)).exp()
    if likelihood.measure == "density":
        cells = torch.cat([x.diff(), torch.zeros(1)]) / 2
        value = value * (cells + cells.roll(1))  # the trapezoid rule
    return x, value


@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "autoregressive"]
)  # whose mean is another one, see test_autoregressive.py
def test_samples_have_the_mean_and_the_variance(name: str) -> None:
    likelihood = build(name)
    params = decoded(likelihood, 1, scale=1.0 if name == "mixture" else 0.7).float()
    draws = DRAWS // 4 if name.startswith("structured") else DRAWS  # each solves a linear system
    samples = likelihood.sample(params.expand(draws, -1, -1, -1), stream(draws)).double()
    assert samples.shape == (draws, *likelihood.image_shape)
    error = samples.std(0) / math.sqrt(draws)
    # What the docstrings of the logistics' means say.
    rounding = 0.003 if name == "mixture" else 1e-4 if "logistic" in kind(likelihood) else 1e-6
    assert ((samples.mean(0) - likelihood.mean(params)[0].double()).abs() < 5 * error + rounding).all()
    variance = likelihood.variance(params)
    if variance is not None:
        expected = variance.expand(1, *likelihood.image_shape)[0].double()
        heavy = (
            0.25 if name == "student, one predicted" else 0.08
        )  # fourth moments do not exist below 4 degrees
        torch.testing.assert_close(samples.var(0), expected, rtol=heavy, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_sample_belongs_to_its_slot(name: str) -> None:
    likelihood = build(name)
    params = decoded(likelihood, 6).float()
    whole = likelihood.sample(params, stream(6))
    torch.testing.assert_close(likelihood.sample(params[4:], stream(2, start=4)), whole[4:])
    assert torch.isfinite(likelihood.log_prob(whole, params, everything(whole))).all()
    x = torch.full((6, *likelihood.image_shape), 0.4)
    torch.testing.assert_close(
        likelihood.target(x[4:], stream(2, start=4)), likelihood.target(x, stream(6))[4:]
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_match_finite_differences(name: str, training: bool) -> None:
    likelihood = build(name).double().train(training)
    x = images(likelihood, 3)
    params = decoded(likelihood, 3).requires_grad_()

    # An optimal sigma is held constant: the gradient is then right for the sum over the batch, not for each image.
    before = {n: b.clone() for n, b in likelihood.named_buffers()}

    def summed(p: Tensor) -> Tensor:
        likelihood.load_state_dict(before, strict=False)
        return likelihood.log_prob(x, p, everything(x)).sum()

    assert torch.autograd.gradcheck(summed, (params,), eps=1e-6, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_learned_numbers_get_the_right_gradient(name: str) -> None:
    likelihood = build(name).double()
    x, params = images(likelihood, 3), decoded(likelihood, 3)
    for parameter in likelihood.parameters():
        value = likelihood.log_prob(x, params, everything(x)).sum()
        (gradient,) = torch.autograd.grad(value, parameter)
        for place in range(parameter.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * 1e-6
                    sides.append(float(likelihood.log_prob(x, params, everything(x)).sum()))
                    parameter.view(-1)[place] -= sign * 1e-6
            slope = (sides[0] - sides[1]) / 2e-6
            rounding = (
                1e-6 if name == "autoregressive" else None
            )  # some of its slopes are 1e-3, of sums of 1e3
            assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("name", CASES)
def test_bf16_parameters_lose_no_more_than_their_own_rounding(name: str) -> None:
    """The sums are float32: within 1e-5 of what float64 makes of the same bf16 parameters, under autocast too."""
    likelihood = build(name)
    x = images(likelihood, 8)
    params = decoded(likelihood, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = likelihood.log_prob(x.float(), params, everything(x))
    assert value.dtype == torch.float32
    expected = likelihood.double().log_prob(x, params.double(), everything(x))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-4)


REFERENCES = {
    "fixed": lambda p: torch.distributions.Normal(torch.sigmoid(p), 0.2),
    "unbounded mean": lambda p: torch.distributions.Normal(p, 0.3),
    "laplace": lambda p: torch.distributions.Laplace(torch.sigmoid(p), 0.3 / math.sqrt(2)),
    "student, fixed": lambda p: torch.distributions.StudentT(5.0, torch.sigmoid(p), 0.1),
    "continuous_bernoulli": lambda p: torch.distributions.ContinuousBernoulli(logits=p),
    "bernoulli": lambda p: torch.distributions.Bernoulli(logits=p),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_it_agrees_with_torch(name: str) -> None:
    likelihood = build(name)
    x, params = images(likelihood, 5), decoded(likelihood, 5)
    reference = REFERENCES[name](params)
    expected = reference.log_prob(x).flatten(1).sum(1)
    # torch's continuous Bernoulli keeps a cruder series around one half.
    tolerance = 1e-4 if name == "continuous_bernoulli" else 1e-10
    value = likelihood.log_prob(x, params, everything(x))
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(likelihood.mean(params), reference.mean, rtol=tolerance, atol=tolerance)


def test_predicted_numbers_agree_with_torch() -> None:
    student = build("student")
    params = decoded(student, 5)
    mean, scale, degrees = params.chunk(3, dim=1)
    x = images(student, 5)
    reference = torch.distributions.StudentT(
        2.01 + torch.nn.functional.softplus(degrees + 8), torch.sigmoid(mean), 0.25 * scale.exp()
    )
    torch.testing.assert_close(
        student.log_prob(x, params, everything(x)), reference.log_prob(x).flatten(1).sum(1), rtol=1e-8, atol=0
    )
    gaussian = build("predicted")
    params = decoded(gaussian, 5)
    mean, raw = params.chunk(2, dim=1)
    normal = torch.distributions.Normal(torch.sigmoid(mean), 0.25 * raw.exp())
    torch.testing.assert_close(
        gaussian.log_prob(x, params, everything(x)),
        normal.log_prob(x).flatten(1).sum(1),
        rtol=1e-8,
        atol=1e-8,
    )


def test_categorical_and_bitwise_agree_with_torch() -> None:
    x = images(build("categorical", SHAPE), 4)
    levels = (x * 255).round().long()
    params = decoded(build("categorical", SHAPE), 4)
    logits = params.view(4, 3, 256, 3, 4).movedim(2, -1)
    expected = torch.distributions.Categorical(logits=logits).log_prob(levels).flatten(1).sum(1)
    torch.testing.assert_close(build("categorical", SHAPE).log_prob(x, params, everything(x)), expected)
    params = decoded(build("bitwise"), 4)
    logits = params.view(4, 3, 8, 3, 4).movedim(2, -1)
    bits = torch.tensor([[int(digit) for digit in f"{int(level):08b}"] for level in levels.flatten()])
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(bits.view_as(logits).double())
    torch.testing.assert_close(
        build("bitwise").log_prob(x, params, everything(x)), expected.flatten(1).sum(1)
    )


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.7, 1.0, 2.0])
def test_level_masses_agree_with_scipy(scale: float, mean: float) -> None:
    """Differences of the survival function where those of the distribution function have lost their digits."""
    from vaescale.likelihoods.discretized_logistic import log_level_mass

    v = torch.linspace(-1, 1, 256, dtype=torch.float64)
    value = log_level_mass(v, torch.full_like(v, mean), torch.full_like(v, math.log(scale)))
    edges = np.concatenate([[-np.inf], (v[:-1] + v[1:]).numpy() / 2, [np.inf]])
    logistic = stats.logistic(loc=mean, scale=scale)
    lower, upper = np.diff(logistic.cdf(edges)), -np.diff(logistic.sf(edges))
    mass = np.where(v.numpy() < mean, lower, upper)
    seen = mass > 1e-200
    np.testing.assert_allclose(value.numpy()[seen], np.log(mass[seen]), rtol=1e-6, atol=1e-8)
    assert torch.isfinite(value).all()
    assert float(value.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_mixture_sums_to_one_over_the_channels() -> None:
    """Summed over green and blue, it leaves red's own mixture, which scipy knows."""
    likelihood = build("mixture", (3, 1, 1))
    params = decoded(likelihood, 1)
    logits, means, raw, _ = params.view(3, 10).split([1, 3, 3, 3], dim=1)
    weights, scales = torch.softmax(logits[:, 0], 0).numpy(), 0.25 * raw[:, 0].exp().numpy()
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 256, dtype=torch.float64)] * 2)
    total = 0.0
    for red in (0, 1, 100, 128, 254, 255):
        x = torch.cat([torch.full((len(grid), 1), red / 255), grid], dim=1).view(-1, 3, 1, 1)
        mass = float(likelihood.log_prob(x, params.expand(len(x), -1, -1, -1), everything(x)).exp().sum())
        low = -np.inf if red == 0 else 2 * (red - 0.5) / 255 - 1
        high = np.inf if red == 255 else 2 * (red + 0.5) / 255 - 1
        own = [stats.logistic(m, s) for m, s in zip(means[:, 0].numpy(), scales, strict=True)]
        expected = sum(w * (c.cdf(high) - c.cdf(low)) for w, c in zip(weights, own, strict=True))
        assert mass == pytest.approx(expected, rel=1e-4), red
        total += mass
    assert total < 1


def test_the_mixture_s_channels_depend_on_those_before() -> None:
    """Against a loop over components and channels, as eq. 3 says it."""
    likelihood = build("mixture", (3, 1, 1))
    params, x = decoded(likelihood, 1), images(likelihood, 1)
    v = (2 * x.flatten() - 1).tolist()
    parts = params.view(3, 10)
    total = 0.0
    weights = torch.softmax(parts[:, 0], 0).tolist()
    for weight, row in zip(weights, parts.tolist(), strict=True):
        m, s, c = row[1:4], [0.25 * math.exp(raw) for raw in row[4:7]], [math.tanh(raw) for raw in row[7:]]
        means = [m[0], m[1] + c[0] * v[0], m[2] + c[1] * v[0] + c[2] * v[1]]
        masses = [
            stats.logistic.cdf((value + 1 / 255 - mean) / scale)
            - stats.logistic.cdf((value - 1 / 255 - mean) / scale)
            for value, mean, scale in zip(v, means, s, strict=True)
        ]
        total += weight * math.prod(masses)
    value = likelihood.log_prob(x, params, everything(x))
    assert float(value) == pytest.approx(math.log(total), rel=1e-5)


@pytest.mark.parametrize("name", ["structured", "structured, 5x5"])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 3)])
def test_the_structured_density_is_the_dense_gaussian_s(name: str, shape: tuple[int, int, int]) -> None:
    likelihood = build(name, shape)
    params, x = decoded(likelihood, 2, scale=0.4), images(likelihood, 2)
    covariance = dense_covariance(likelihood, params[0])
    mean = torch.sigmoid(params[0, : shape[0]]).flatten().numpy()
    expected = stats.multivariate_normal(mean, covariance).logpdf(x[0].flatten().numpy())
    value = likelihood.log_prob(x, params, everything(x))
    assert float(value[0]) == pytest.approx(float(expected), rel=1e-8)


def test_structured_samples_have_the_dense_covariance() -> None:
    likelihood = build("structured", (3, 2, 2))
    params = decoded(likelihood, 1, scale=0.4)
    samples = likelihood.sample(params.expand(10_000, -1, -1, -1), stream(10_000)).flatten(1)
    expected = dense_covariance(likelihood, params[0])
    error = np.abs(np.cov(samples.T.numpy()) - expected) / np.sqrt(
        np.outer(expected.diagonal(), expected.diagonal())
    )
    assert error.max() < 5 * math.sqrt(2 / 10_000)


def dense_covariance(likelihood: Likelihood, params: Tensor) -> np.ndarray:
    """Of one image, from L built entry by entry: column j holds value j and the neighbours after it."""
    channels, height, width = likelihood.image_shape
    offsets = offsets_after(likelihood.config.radius)
    sizes = [channels, channels, channels * len(offsets), channels * (channels - 1) // 2]
    _, raw, neighbours, between = params.split(sizes)
    sigma = 0.25 * raw.exp()
    values = list(itertools.product(range(channels), range(height), range(width)))
    number = {value: place for place, value in enumerate(values)}
    pairs = list(itertools.combinations(range(channels), 2))
    factor = np.zeros((len(values), len(values)))
    for (c, i, j), column in number.items():
        factor[column, column] = 1 / sigma[c, i, j]
        for k, (down, right) in enumerate(offsets):
            if (c, i + down, j + right) in number:
                row = number[c, i + down, j + right]
                factor[row, column] = neighbours[c * len(offsets) + k, i, j] / sigma[c, i, j]
        for k, (early, late) in enumerate(pairs):
            if early == c:
                factor[number[late, i, j], column] = between[k, i, j] / sigma[c, i, j]
    return np.linalg.inv(factor @ factor.T)


def test_a_mixture_of_one_channel_has_its_exact_mean() -> None:
    likelihood = build("mixture", (1, 1, 1))
    for seed in range(4):
        params = decoded(likelihood, 1, scale=1.5, seed=seed)
        levels, masses = support(likelihood, params)
        assert float((levels * masses).sum()) == pytest.approx(float(likelihood.mean(params)), abs=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_extreme_outputs_leave_values_and_gradients_finite(name: str, size: float) -> None:
    likelihood = build(name)
    for sign in (size, -size):
        params = (sign * decoded(likelihood, 4).float().abs()).requires_grad_()
        x = images(likelihood, 4).float()
        x[0], x[1] = 0.0, 1.0
        value = likelihood.log_prob(x, params, everything(x))
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(params.grad).all()
        mean = likelihood.mean(params.detach()).detach()
        assert torch.isfinite(mean).all()
        if likelihood.measure == "mass":
            assert float(mean.min()) >= 0
            assert float(mean.max()) <= 1 + 1e-6


def test_many_degrees_of_freedom_are_a_gaussian_in_float32_too() -> None:
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(2, *SHAPE)
    for degrees in (1e5, 1e7):
        keys = {"kind": "student_t", "scale": 0.2, "degrees_of_freedom": degrees}
        config = OneOf(LIKELIHOODS).validate(keys)
        student = config.implement(image_shape=SHAPE)
        expected = torch.distributions.Normal(0.5, 0.2).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(student.log_prob(x, params, everything(x)), expected, rtol=1e-3, atol=1e-3)


def test_a_sure_continuous_bernoulli_loses_no_digits_in_float32() -> None:
    likelihood = build("continuous_bernoulli", (1, 8, 8))
    for size in (1e3, 1e4, 1e5):
        for sign, end in ((1, 1.0), (-1, 0.0)):
            x, params = torch.full((1, 1, 8, 8), end), torch.full((1, 1, 8, 8), sign * size)
            assert float(likelihood.log_prob(x, params, everything(x))) == pytest.approx(
                64 * math.log(size), rel=1e-6
            )


def test_learned_numbers_in_bf16_are_computed_with_in_float32() -> None:
    for name in ("shared", "student, shared", "logistic, shared"):
        likelihood = build(name).bfloat16()
        x, params = images(likelihood, 4), decoded(likelihood, 4)
        value = likelihood.log_prob(x.float(), params.float(), everything(x))
        expected = likelihood.double().log_prob(x, params, everything(x))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-4)


def test_a_neighbourhood_as_large_as_the_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"likelihood.radius \(=2\) must be below data.image_size \(=2\)"):
        build("structured, 5x5", (1, 2, 2))


def test_a_continuous_bernoulli_is_smooth_where_its_series_begins() -> None:
    t = torch.cat([torch.linspace(-0.8, 0.8, 4001), torch.tensor([-800.0, -50.0, 50.0, 800.0])]).double()
    for x in (0.0, 0.3, 1.0):
        points = torch.full_like(t, x)
        value = log_density(points, t.requires_grad_())
        (slope,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(slope, x - mean(t.detach()), rtol=1e-9, atol=1e-12)
        value, inner = value.detach(), t.detach()[:4001]
        safe = torch.where(inner == 0, 1.0, inner)
        normalizer = torch.where(inner == 0, 0.0, torch.log(torch.expm1(safe) / safe))
        torch.testing.assert_close(value[:4001], inner * x - normalizer, rtol=1e-9, atol=1e-12)


def test_binarization() -> None:
    grey = torch.full((2000, 1, 2, 2), 0.3)
    stochastic = build("bernoulli", (1, 2, 2)).target(grey, stream(2000))
    assert set(stochastic.unique().tolist()) == {0.0, 1.0}
    assert float(stochastic.mean()) == pytest.approx(0.3, abs=0.03)
    other = build("bernoulli", (1, 2, 2)).target(grey, noise.Stream(0, 1, torch.arange(2000)))
    assert not torch.equal(stochastic, other), "drawn anew at each step"
    config = OneOf(LIKELIHOODS).validate({"kind": "bernoulli", "binarize": "threshold"})
    threshold = config.implement(image_shape=(1, 2, 2))
    assert threshold.target(torch.tensor([0.2, 0.5, 0.51, 1.0]), stream(1)).tolist() == [0, 0, 1, 1]


def test_a_dequantized_density_bounds_the_code_length() -> None:
    """One value, a Gaussian much wider than a level: E log p(x + u) is below the log mass of the level's cell, closely."""
    config = OneOf(LIKELIHOODS).validate({"kind": "gaussian", "sigma": 0.02, "dequantize": True})
    likelihood = config.implement(image_shape=(1, 1, 1)).eval()
    level, count = 130, 20_000
    x = torch.full((count, 1, 1, 1), level / 255)
    target = likelihood.target(x, stream(count))
    assert float(target.min()) >= level / 256
    assert float(target.max()) < (level + 1) / 256
    params = torch.zeros(count, 1, 1, 1)
    bound = float(likelihood.log_prob(target, params, everything(x)).double().mean()) - math.log(256)
    normal = stats.norm(0.5, 0.02)
    mass = math.log(normal.cdf((level + 1) / 256) - normal.cdf(level / 256))
    assert bound < mass
    assert bound == pytest.approx(mass, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    likelihood = build(name)
    x, params = images(likelihood, 4).float(), decoded(likelihood, 4).float()
    found = []
    for device in ("cpu", "cuda"):
        there = build(name).train().to(device)
        value = there.log_prob(x.to(device), params.to(device), everything(x).to(device))
        there.end_step()
        drawn = there.sample(params.to(device), noise.Stream(0, 0, torch.arange(4, device=device)))
        found.append([part.detach().cpu() for part in (value, there.mean(params.to(device)), drawn)])
    (value, mean, drawn), (value_there, mean_there, drawn_there) = found
    torch.testing.assert_close(value_there, value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean_there, mean, rtol=1e-4, atol=1e-5)
    # The devices' logarithms differ in the last digit, so that a level may fall on the other side of an edge.
    assert float(((drawn_there - drawn).abs() < 1e-3).float().mean()) > 0.95


@pytest.mark.parametrize("degrees", [1e-3, 0.01, 0.1, 0.5, 1e6, 1e12, 1e15])
def test_a_student_s_extreme_degrees_keep_their_digits(degrees: float) -> None:
    """Draws are finite, with the right share beyond a bound far out; the density is scipy's, or the normal one for many degrees."""
    config = OneOf(LIKELIHOODS).validate(
        {"kind": "student_t", "degrees_of_freedom": degrees, "scale": 0.3, "mean": "identity"}
    )
    likelihood = config.implement(image_shape=(1, 4, 4)).eval()
    params = torch.zeros(1000, 1, 4, 4)
    draws = likelihood.sample(params, stream(1000))
    assert torch.isfinite(draws).all()
    student = stats.t(degrees, 0, 0.3)
    for bound in (0.3, 1e30):
        share, expected = float((draws.abs() > bound).double().mean()), 2 * student.sf(bound)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / 16_000) + 1e-9)
    x = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    exact = student if degrees < 1e9 else stats.norm(0, 0.3)
    value = likelihood.log_prob(x, params[:1], everything(x))
    assert float(value) == pytest.approx(exact.logpdf(x.double().numpy()).sum(), abs=1e-4)
