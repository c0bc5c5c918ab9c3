"""EM against scikit-learn from the same start, for every covariance; against mixtures that are known; over ranks."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from tests.aggregate.known import draws, known
from tests.ranks import on_ranks
from vaescale import noise
from vaescale.mixtures.em import fit
from vaescale.mixtures.gaussian import KINDS, Kind, Mixture, log_density, log_joint, moments
from vaescale.mixtures.points import Points
from vaescale.mixtures.starts import STARTS, Start, some, start
from vaescale.mixtures.steps import Frame, expectation, maximization, standardize
from vaescale.mixtures.stepwise import fit_stepwise


def first(z: Tensor, components: int, kind: Kind, how: Start = "kmeans") -> Mixture:
    return start(Points(z), components, kind=kind, how=how, seed=0)


def scikit_learn(mixture: Mixture, **options: float) -> GaussianMixture:
    inverse = torch.linalg.inv if mixture.kind in ("full", "tied") else torch.reciprocal
    return GaussianMixture(
        len(mixture.weights),
        covariance_type=mixture.kind,
        weights_init=mixture.weights.numpy(),
        means_init=mixture.means.numpy(),
        precisions_init=inverse(mixture.covariances).numpy(),
        **options,
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # so many steps on purpose
@pytest.mark.parametrize("iterations", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_scikit_learn_s_steps(kind: Kind, iterations: int) -> None:
    z = draws(known(kind), 2000)
    begin = first(z, 4, kind)
    own = fit(Points(z), begin, tolerance=-math.inf, max_iterations=iterations, dtype=torch.float64)
    reference = scikit_learn(begin, tol=0.0, max_iter=iterations, reg_covar=1e-6).fit(z.numpy())
    np.testing.assert_allclose(log_density(own.mixture, z), reference.score_samples(z.numpy()), atol=1e-5)
    assert own.history[-1] == pytest.approx(reference.lower_bound_, abs=1e-8)
    quick = fit(Points(z), begin, tolerance=-math.inf, max_iterations=iterations)
    np.testing.assert_allclose(quick.history, own.history, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_never_falls(kind: Kind) -> None:
    z = draws(known(kind), 3000)
    begin = first(z, 5, kind, "random")
    done = fit(Points(z), begin, tolerance=1e-9, max_iterations=60, ridge=0.0, dtype=torch.float64)
    assert all(later >= earlier - 1e-10 for earlier, later in itertools.pairwise(done.history))
    assert done.history[-1] > done.history[0] + 0.01
    assert done.reseeded == 0
    before = fit(Points(z), begin, tolerance=1e-9, max_iterations=59, ridge=0.0, dtype=torch.float64)
    assert done.history[59] == pytest.approx(float(log_density(before.mixture, z).mean()), abs=1e-9)


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_known_mixture_is_recovered(kind: Kind, how: Start) -> None:
    truth, z = known(kind), draws(known(kind), 20_000)
    begins = [
        start(Points(z), 3, kind=kind, how=how, seed=seed) for seed in range(1 if how == "kmeans" else 4)
    ]
    fits = [fit(Points(z), begin, tolerance=1e-7) for begin in begins]
    done = max(fits, key=lambda one: one.history[-1])  # chance alone may begin near a lesser optimum
    assert done.converged
    order = done.mixture.weights.argsort(descending=True)
    torch.testing.assert_close(done.mixture.weights[order], truth.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(done.mixture.means[order], truth.means, rtol=0, atol=0.05)
    covariances = done.mixture.covariances if kind == "tied" else done.mixture.covariances[order]
    torch.testing.assert_close(covariances, truth.covariances, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_one_component_is_the_moments(kind: Kind) -> None:
    z = draws(known("full"), 500)
    done = fit(Points(z), first(z, 1, kind), ridge=0.0, dtype=torch.float64)
    torch.testing.assert_close(done.mixture.means[0], z.mean(0))
    torch.testing.assert_close(done.mixture.covariances.view(3, 3), torch.cov(z.T, correction=0))


def test_standard_normal_latents_give_the_standard_normal_back() -> None:
    z = noise.normal(noise.Stream(0, 0, torch.arange(30_000)), noise.PRIOR, (4,))
    done = fit(Points(z), first(z, 6, "full"), tolerance=1e-4)
    other = noise.normal(noise.Stream(1, 0, torch.arange(30_000)), noise.PRIOR, (4,)).double()
    normal = Mixture(torch.ones(1).double(), torch.zeros(1, 4).double(), torch.eye(4).double()[None])
    # What overfitting costs: about half a nat for each of 89 parameters over 30,000 latents.
    gap = float((log_density(normal, other) - log_density(done.mixture, other)).mean())
    assert 0 <= gap < 0.01
    mean, covariance = moments(done.mixture)
    torch.testing.assert_close(mean, torch.zeros(4).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(covariance, torch.eye(4).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_the_limit_of_many_draws(kind: Kind) -> None:
    """E_q of each log joint, and the sums of the M step, from the means and variances of q against 4,000 draws of each."""
    generator = torch.Generator().manual_seed(1)
    mixture, images, many = known(kind), 12, 4000
    mean = draws(mixture, images)
    variance = 0.02 + 0.3 * torch.rand(images, 3, generator=generator, dtype=torch.float64)
    z = mean[:, None] + variance.sqrt()[:, None] * torch.randn(
        images, many, 3, generator=generator, dtype=torch.float64
    )
    expected = log_joint(mixture, z.flatten(0, 1)).view(images, many, -1).mean(1)
    responsibilities = torch.softmax(expected, dim=1)
    frame = Frame(torch.zeros(3).double(), torch.eye(3).double())
    value, sums = expectation(Points(mean, variance), mixture, frame)
    assert value == pytest.approx(float(torch.logsumexp(expected, 1).mean()), rel=0.01)
    firsts = torch.einsum("nk,nsi->ki", responsibilities, z) / (images * many)
    seconds = torch.einsum("nk,nsi,nsj->kij", responsibilities, z, z) / (images * many)
    torch.testing.assert_close(sums.weights, responsibilities.mean(0), rtol=0.03, atol=0.01)
    torch.testing.assert_close(sums.firsts, firsts, rtol=0.01, atol=0.02)
    wanted = {"full": seconds, "tied": seconds.sum(0)}.get(kind, seconds.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(sums.seconds, wanted, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_bound_rises_and_lies_below_the_density(kind: Kind) -> None:
    mean = draws(known(kind), 400)
    variance = torch.full_like(mean, 0.05)
    points = Points(mean, variance)
    done = fit(points, first(mean, 3, kind), tolerance=1e-6, ridge=0.0, dtype=torch.float64)
    assert all(later >= earlier - 1e-10 for earlier, later in itertools.pairwise(done.history))
    z = (
        mean.repeat(50, 1)
        + 0.05**0.5 * torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).double()
    )
    assert done.history[-1] < float(log_density(done.mixture, z).mean())


def test_an_empty_component_is_given_half_of_the_heaviest() -> None:
    z = draws(known("full"), 1000)
    begin = first(z, 3, "full")
    means = begin.means.clone()
    means[0] = 1e4
    done = fit(Points(z), begin._replace(means=means), tolerance=1e-6)
    assert done.reseeded == 1
    assert done.converged
    assert (done.mixture.weights > 0.1).all()
    assert done.history[-1] == pytest.approx(fit(Points(z), begin, tolerance=1e-6).history[-1], abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_and_constant_latents_do_not_blow_up(kind: Kind) -> None:
    z = torch.tensor([[0.0, 0.0, 7.0], [1.0, 1.0, 7.0]], dtype=torch.float64).repeat(20, 1)
    done = fit(Points(z), first(z, 5, kind), ridge=1e-3)
    assert all(math.isfinite(value) for value in done.history)
    assert torch.isfinite(log_density(done.mixture, z)).all()
    assert done.reseeded < 20, "some components stay empty"
    assert done.converged


def test_float32_gives_way_where_it_is_too_coarse() -> None:
    """Two narrow components far apart: 1e-4 wide, 1 apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    z = centres.repeat(500, 1) + 1e-4 * torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    done = fit(Points(z), first(z, 2, "full"), ridge=1e-14)
    wanted = fit(Points(z), first(z, 2, "full"), ridge=1e-14, dtype=torch.float64)
    assert done.converged
    assert done.history[-1] == pytest.approx(wanted.history[-1], abs=1e-6)
    torch.testing.assert_close(done.mixture.covariances, wanted.mixture.covariances, rtol=1e-4, atol=0)


def test_float32_is_checked_where_it_does_not_converge_and_for_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    z = centres.repeat(500, 1) + 1e-4 * torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    for variance in (None, torch.full_like(z, 1e-9)):
        begin = first(z, 2, "diag")
        done, wanted = (
            fit(Points(z, variance), begin, ridge=1e-14, tolerance=-math.inf, max_iterations=2, dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(done.mixture.covariances, wanted.mixture.covariances, rtol=1e-4, atol=0)


def test_a_fall_is_no_convergence() -> None:
    """Fifty components for 300 latents: float32 gives way, and what it had reached is no start that EM would have come to."""
    z = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    for components in (50, 100):
        done = fit(Points(z), first(z, components, "full"))
        if done.converged:
            assert abs(done.history[-1] - done.history[-2]) < 1e-3


def test_the_seed_decides() -> None:
    z = draws(known("full"), 300)
    one, again, other = (
        start(Points(z), 6, kind="full", how="kmeans", seed=seed).means for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_some_are_drawn_without_repetition() -> None:
    assert some(10, 20, 0).tolist() == list(range(10))
    drawn = some(1_000_000_000, 1000, 0)
    assert len(drawn) == len(drawn.unique()) == 1000
    assert (drawn.diff() > 0).all()
    assert drawn.max() > 900_000_000


def test_standardizing_keeps_a_small_spread_far_from_zero() -> None:
    z = draws(known("full"), 5000) * torch.tensor([1.0, 1e-3, 1e3]) + torch.tensor([0.0, 1e3, 0.0])
    frame = standardize(Points(z), "full")
    u = (z - frame.shift) @ frame.inverse.mT
    torch.testing.assert_close(torch.cov(u.T, correction=0), torch.eye(3).double(), rtol=0, atol=1e-6)


class Shards(Points):
    """Points that every rank has, in shards of 500."""

    def __init__(self, z: Tensor) -> None:
        super().__init__(z)
        self.count = len(z)
        self.shard_samples = np.full(len(z) // 500, 500)

    def take(self, numbers):
        return self.z[torch.from_numpy(numbers)], None


def test_stepwise_comes_near_in_a_few_passes() -> None:
    z = draws(known("full"), 4000)
    begin = first(z, 3, "full", "random")
    done = fit_stepwise(Shards(z), begin, batch=200, passes=4, seed=0)
    assert len(done.history) == 80
    best = float(log_density(fit(Points(z), begin, tolerance=1e-6).mixture, z).mean())
    assert best - 0.03 < float(log_density(done.mixture, z).mean()) <= best


def _fit_on_rank(rank: int, ranks: int, kind: Kind, moments: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    z = draws(known(kind), 2001)
    here = torch.arange(rank, len(z), ranks)
    variance = torch.full_like(z, 0.1)[here] if moments else None
    points = Points(z[here], variance, numbers=here)
    begin = start(points, 4, kind=kind, how="kmeans", seed=0)
    done = fit(points, begin, tolerance=1e-5, dtype=dtype)
    whole = Shards(z[:2000])
    online = fit_stepwise(whole, begin, batch=401, passes=1, seed=0)
    return {
        "begin": begin.means,
        "history": torch.tensor(done.history, dtype=torch.float64),
        "means": done.mixture.means,
        "covariances": done.mixture.covariances,
        "online": online.mixture.means,
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "moments", "dtype"),
    [("full", False, torch.float64), ("tied", True, torch.float64), ("full", False, torch.float32)],
)
def test_the_number_of_ranks_does_not_matter(
    kind: Kind, moments: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    (one,) = on_ranks(tmp_path, _fit_on_rank, kind, moments, dtype, ranks=1)
    for ranks in (2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for other in on_ranks(folder, _fit_on_rank, kind, moments, dtype, ranks=ranks):
            assert torch.equal(one["begin"], other["begin"])
            torch.testing.assert_close(one["online"], other["online"], rtol=1e-3, atol=1e-3)
            if dtype == torch.float64:
                for name in ("history", "means", "covariances"):
                    torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-8)
            else:  # rounding may move the last step by one
                torch.testing.assert_close(one["history"][-1], other["history"][-1], rtol=0, atol=1e-4)
                torch.testing.assert_close(one["means"], other["means"], rtol=0, atol=0.01)


def test_the_m_step_of_a_mixture_s_own_sums_is_the_mixture() -> None:
    for kind in KINDS:
        mixture = known(kind)
        z = draws(mixture, 100_000)
        frame = standardize(Points(z), kind)
        _, sums = expectation(Points(z), mixture, frame)
        moved, empty = maximization(sums, frame, kind, 0.0, len(z))
        assert empty == 0
        torch.testing.assert_close(moved.covariances, mixture.covariances, rtol=0, atol=0.02)


def narrow_and_far(width: float) -> Tensor:
    """Two clusters `width` wide, 1 apart, float64 [2000, 2]."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    return centres.repeat(1000, 1) + width * torch.randn(2000, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_no_density_of_a_coarse_float32_is_reported_or_kept(kind: Kind) -> None:
    z, reported = narrow_and_far(1e-6), list[float]()
    begin = first(z, 2, kind)
    done = fit(Points(z), begin, ridge=1e-18, report=lambda _, nats: reported.append(nats))
    assert reported == done.history
    assert done.history[0] == pytest.approx(float(log_density(begin, z).mean()), abs=1e-3)
    assert all(later >= earlier - 1e-3 for earlier, later in itertools.pairwise(done.history))
    assert done.history[-1] == pytest.approx(float(log_density(done.mixture, z).mean()), abs=1e-3)


@pytest.mark.parametrize("widened", [1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_turns_to_float64_on_narrow_far_clusters(kind: Kind, widened: float) -> None:
    """From a start on which float32 is already too coarse, and from one on which it still agrees."""
    z = narrow_and_far(1e-4)
    begin = first(z, 2, kind)
    begin = begin._replace(covariances=begin.covariances * widened)
    done = fit_stepwise(Shards(z), begin, batch=100, passes=2, seed=0, ridge=1e-14)
    before, after = (float(log_density(mixture, z).mean()) for mixture in (begin, done.mixture))
    assert after > before + 3
    assert len(done.history) == 40
    assert max(done.history) < after + 1, "no density of a float32 that was wrong"
    assert not done.note


def test_stepwise_returns_its_start_where_no_pass_improves_on_it() -> None:
    """Batches of 3 latents for 8 parameters, from the optimum."""
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    best = fit(Points(z), first(z, 1, "diag"), dtype=torch.float64).mixture
    done = fit_stepwise(Shards(z), best, batch=3, passes=1, seed=0)
    assert done.mixture is best
    assert done.history == []
    assert "below its start" in done.note
