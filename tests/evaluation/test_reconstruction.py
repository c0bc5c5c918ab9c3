"""Calibration by known noise, PSNR and SSIM by definition, and the sigma that fits given images."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.data.batch import Batch
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import open_reader
from vaescale.evaluation.likelihood import Bound
from vaescale.evaluation.measures import measure
from vaescale.evaluation.reconstruction import METRICS, Metric, Reconstruction
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe
from vaescale.trained import build_model

SHAPE = (1, 8, 8)
NOISY = (
    {"kind": "gaussian", "sigma": 0.2, "mean": "identity"},
    {"kind": "gaussian", "sigma": "predicted", "mean": "identity"},
    {"kind": "laplace", "sigma": 0.2, "mean": "identity"},
    {"kind": "student_t", "mean": "identity"},
    {"kind": "student_t", "mean": "identity", "scale": 0.1, "degrees_of_freedom": 3},
)


def build(content):
    config = OneOf(LIKELIHOODS).validate(content)
    return config.implement(image_shape=SHAPE).eval()


@pytest.mark.parametrize(
    "content", NOISY, ids=lambda content: f"{content['kind']}-{content.get('sigma', '')}"
)
def test_of_its_own_draws_the_central_mass_is_uniform(content) -> None:
    likelihood = build(content)
    params = torch.randn(200, likelihood.num_params(1), 8, 8, generator=torch.Generator().manual_seed(0))
    x = likelihood.sample(params, noise.Stream(0, 0, torch.arange(200)))
    inside = likelihood.central_mass(x, params).flatten()
    assert stats.kstest(inside.double().numpy(), "uniform").statistic < 2 / math.sqrt(len(inside))


def test_masses_have_no_central_intervals() -> None:
    likelihood = build({"kind": "categorical"})
    assert likelihood.central_mass(torch.zeros(1, *SHAPE), torch.zeros(1, 256, 8, 8)) is None


def recipe(content, **changes) -> Recipe:
    return Recipe.model_validate({**content, **changes})


def measured(own: Recipe, batch: int = 100):
    model, reader = build_model(own).eval(), open_reader(own.data.val, own.data)
    return model, reader, found(model, evaluation_batches(reader, batch=batch, rank=0, world_size=1))


class Found(NamedTuple):
    metrics: dict[str, float]
    protocol: dict[str, str]
    coverage: list[float] | None


def found(model: VAE, batches: Iterable[Batch]) -> Found:
    own = Reconstruction(model)
    metrics = measure(model, batches, [Bound(model), own], seed=0)
    return Found(metrics, own.protocol, own.coverage)


def test_numbers_are_those_of_their_definitions(recipe_content) -> None:
    own = recipe(recipe_content)
    model, reader, result = measured(own)
    x = torch.cat([reader[number].images for number in range(360)]).float() / 255
    with torch.no_grad():
        means = model.likelihood.mean(model.reconstruct(x))
        params = model.infer(model.encode(x), noise.Stream(0, 0, torch.arange(360)), 1, False).params
        drawn = model.likelihood.mean(params)
    mse = (x - means).square().flatten(1).mean(1)
    assert result.metrics["reconstruction_mse"] == pytest.approx(float(mse.mean()), rel=1e-5)
    assert result.metrics["psnr_db"] == pytest.approx(float((10 * torch.log10(1 / mse)).mean()), rel=1e-5)
    error = (x - drawn).numpy()
    assert result.metrics["data_sigma"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    sigma = float(model.likelihood.sigma)
    for level in (50, 90, 99):
        within = np.abs(error) <= stats.norm.ppf(0.5 + level / 200) * sigma
        assert result.metrics[f"interval_coverage/{level}"] == pytest.approx(within.mean(), abs=1e-4)
    assert result.coverage is not None
    assert result.coverage[-1] == 1


def test_batches_do_not_matter(recipe_content) -> None:
    one, other = (measured(recipe(recipe_content), batch)[2] for batch in (360, 7))
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)


@pytest.mark.parametrize("sigma", ["optimal", "optimal_per_pixel", "optimal_per_channel", "shared"])
def test_the_data_s_own_sigma_maximizes_the_likelihood(recipe_content, sigma: str) -> None:
    own = recipe(recipe_content, likelihood={"kind": "laplace", "sigma": sigma})
    model, reader, result = measured(own)
    x = torch.cat([reader[number].images for number in range(360)]).float() / 255
    with torch.no_grad():
        params = model.infer(model.encode(x), noise.Stream(0, 0, torch.arange(360)), 1, False).params
    error = (x - model.likelihood.mean(params)).abs().double()
    over = {"optimal_per_pixel": (0,), "optimal_per_channel": (0, 2, 3)}.get(sigma, (0, 1, 2, 3))
    by_group = math.sqrt(2) * error.mean(over)
    assert result.metrics["data_sigma"] == pytest.approx(float(by_group.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("size", [(11, 11), (30, 30), (12, 20), (20, 12)])
def test_ssim_is_that_of_wang_et_al(size: tuple[int, int]) -> None:
    """Their equation 13 in float64, with SciPy's Gaussian window, over the places at which the window is within the image."""
    random = np.random.default_rng(0)
    x = gaussian_filter(random.random((3, 2, *size)), (0, 0, 2, 2))
    y = np.clip(x + 0.1 * random.standard_normal(x.shape), 0, 1)

    def windowed(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (0, 0, 1.5, 1.5), truncate=3.5)[..., 5:-5, 5:-5]

    mean_x, mean_y = windowed(x), windowed(y)
    variances = windowed(x * x) - mean_x**2 + windowed(y * y) - mean_y**2
    covariance = windowed(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    similarity /= (mean_x**2 + mean_y**2 + 0.01**2) * (variances + 0.03**2)
    got = METRICS["ssim"].of(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    np.testing.assert_allclose(got, similarity.mean((1, 2, 3)), rtol=1e-4)


def test_metrics_of_constant_grey() -> None:
    """SSIM is then (2 a b + c) / (a^2 + b^2 + c)."""
    x, means = torch.full((2, 1, 16, 16), 0.2), torch.full((2, 1, 16, 16), 0.5)
    c = 0.01**2
    mse, psnr, ssim = (float(metric.of(x, means).mean()) for metric in METRICS.values())
    assert ssim == pytest.approx((2 * 0.2 * 0.5 + c) / (0.2**2 + 0.5**2 + c), rel=1e-4)
    assert mse == pytest.approx(0.09)
    assert psnr == pytest.approx(10 * math.log10(1 / 0.09))
    exact = [float(metric.of(x, x).mean()) for metric in METRICS.values()]
    assert exact[1:] == pytest.approx([100, 1])


def test_a_metric_from_outside_is_measured(recipe_content, monkeypatch: pytest.MonkeyPatch) -> None:
    def absolute_error(x: Tensor, means: Tensor) -> Tensor:
        return (x - means).abs().flatten(1).mean(1)

    monkeypatch.setitem(METRICS, "mae", Metric("mean absolute error per value", absolute_error))
    monkeypatch.setitem(METRICS, "too_large", Metric("of images of a thousand pixels", lambda *_: None))
    model, reader, result = measured(recipe(recipe_content), batch=7)
    x = torch.cat([reader[number].images for number in range(360)]).float() / 255
    with torch.no_grad():
        means = model.likelihood.mean(model.reconstruct(x)).clamp(0, 1)
    assert result.metrics["mae"] == pytest.approx(float((x - means).abs().mean()), rel=1e-5)
    assert result.protocol["mae"] == "mean absolute error per value"
    assert "too_large" not in {**result.metrics, **result.protocol}


def test_padding_is_left_out(recipe_content) -> None:
    model = build_model(recipe(recipe_content)).eval()
    images = torch.randint(0, 256, (4, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, slots = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    whole = found(model, [Batch(images[:3], labels[:3], slots[:3], slots[:3] < 9)])
    padded = found(model, [Batch(images, labels, slots, slots < 3)])
    assert padded.metrics == pytest.approx(whole.metrics, rel=1e-6)
