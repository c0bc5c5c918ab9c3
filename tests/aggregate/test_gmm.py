"""EM against scikit-learn from the same start, and against mixtures that are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from vaescale import noise
from vaescale.aggregate import gmm
from vaescale.aggregate.samplers import sample_mixture
from vaescale.errors import UserError


@pytest.fixture
def known() -> gmm.Mixture:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) * 0.3
    covariances = factors @ factors.mT + 0.05 * torch.eye(2, dtype=torch.float64)
    means = torch.tensor([[-3.0, 0.0], [2.0, 2.0], [2.0, -3.0]], dtype=torch.float64)
    return gmm.Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances)


def draw(mixture: gmm.Mixture, count: int) -> torch.Tensor:
    return sample_mixture(noise.Stream(0, 0, torch.arange(count)), mixture).double()


def to_sklearn(mixture: gmm.Mixture, **options) -> GaussianMixture:
    precisions = np.linalg.inv(mixture.covariances.numpy())
    return GaussianMixture(
        len(mixture.weights),
        weights_init=mixture.weights.numpy(),
        means_init=mixture.means.numpy(),
        precisions_init=precisions,
        **options,
    )


def test_log_density_agrees_with_scipy(known: gmm.Mixture) -> None:
    z = draw(known, 50)
    densities = sum(
        w * multivariate_normal(m, c).pdf(z)
        for w, m, c in zip(*(tensor.numpy() for tensor in known), strict=True)
    )
    np.testing.assert_allclose(gmm.log_density(known, z), np.log(densities), rtol=1e-10)
    normal = multivariate_normal(np.zeros(2), np.eye(2)).logpdf(z)
    np.testing.assert_allclose(gmm.standard_normal_log_density(z), normal, rtol=1e-10)


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning"
)  # a fixed number of steps on purpose
@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_em_takes_scikit_learn_s_steps(known: gmm.Mixture, iterations: int) -> None:
    z = draw(known, 2000)
    start = gmm._maximization(z, gmm._kmeans(z, 4, 0), 1e-6)
    # From the same start, n steps of both: the last M step of fit is the one before the last likelihood.
    mixture, history = gmm.fit(z, 4, seed=0, tolerance=-math.inf, max_iterations=iterations)
    reference = to_sklearn(start, tol=0.0, max_iter=iterations, reg_covar=1e-6).fit(z.numpy())
    assert len(history) == iterations
    np.testing.assert_allclose(gmm.log_density(mixture, z), reference.score_samples(z.numpy()), atol=1e-8)


def test_the_likelihood_never_falls(known: gmm.Mixture) -> None:
    _, history = gmm.fit(draw(known, 3000), 5, seed=1, tolerance=1e-9, max_iterations=60)
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(history))
    assert history[-1] > history[0]


def test_a_known_mixture_is_recovered(known: gmm.Mixture) -> None:
    mixture, _ = gmm.fit(draw(known, 20_000), 3, seed=0, tolerance=1e-8)
    order = mixture.weights.argsort(descending=True)
    torch.testing.assert_close(mixture.weights[order], known.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(mixture.means[order], known.means, rtol=0, atol=0.05)
    torch.testing.assert_close(mixture.covariances[order], known.covariances, rtol=0, atol=0.05)


def test_samples_have_the_mixture_s_moments(known: gmm.Mixture) -> None:
    z = draw(known, 100_000)
    mean = known.weights @ known.means
    second = known.covariances + known.means[:, :, None] * known.means[:, None]
    covariance = torch.einsum("k,kij->ij", known.weights, second) - mean[:, None] * mean
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(z.T), covariance, rtol=0.03, atol=0.05)


def test_one_component_is_the_moments(known: gmm.Mixture) -> None:
    z = draw(known, 500)
    mixture, _ = gmm.fit(z, 1, seed=0, ridge=0.0)
    torch.testing.assert_close(mixture.means[0], z.mean(0))
    torch.testing.assert_close(mixture.covariances[0], torch.cov(z.T, correction=0))


def test_the_seed_decides(known: gmm.Mixture) -> None:
    z = draw(known, 300)
    first, again, other = (gmm.fit(z, 6, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)


def test_it_comes_back_from_disk(known: gmm.Mixture, tmp_path) -> None:
    gmm.save(known, tmp_path / "gmm", {"components": 3})
    for saved, loaded in zip(known, gmm.load(tmp_path / "gmm"), strict=True):
        assert torch.equal(saved, loaded)


def test_bad_latents_and_folders_get_one_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="lower --components"):
        gmm.fit(torch.randn(3, 2, dtype=torch.float64), 4, seed=0)
    with pytest.raises(UserError, match="collapsed"):
        gmm.fit(torch.ones(30, 2, dtype=torch.float64), 4, seed=0)
    with pytest.raises(UserError, match="vaescale fit-gmm"):
        gmm.load(tmp_path)


def test_repeated_points_do_not_break_the_start() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64).repeat(20, 1)
    mixture, history = gmm.fit(z, 5, seed=0, ridge=1e-3)
    assert all(math.isfinite(value) for value in history)
    assert torch.isfinite(mixture.covariances).all()
