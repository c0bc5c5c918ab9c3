"""Information, KL(q(z)||p(z)) and total correlation where they are known in closed form, for few and many images."""

import math

import pytest
import torch
from torch.distributions import Normal

from tests.aggregate.known import draws, gaussian_case, known
from vaescale.aggregate import densities
from vaescale.aggregate.densities import aggregate_log_density, marginal_log_densities, others_log_density
from vaescale.aggregate.information import Information, information
from vaescale.mixtures.gaussian import Mixture, log_density
from vaescale.mixtures.points import Points

TERMS = ("mutual_information", "aggregate_kl", "total_correlation")


def terms(found: Information, ending: str = "") -> list[float]:
    return [getattr(found, f"{name}{ending}") for name in TERMS]


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("count", [100, 1000])
def test_the_bracket_holds_the_gaussian_s_information_and_the_mixture_hits_it(size: int, count: int) -> None:
    moments, exact = gaussian_case(count, size)
    found = information(moments, seed=0)
    mutual, to_prior, total = terms(found)
    assert mutual < exact
    assert mutual <= math.log(count) + 1e-12, "bounded by the number of images"
    assert min(to_prior, total) > 1.5, "what I lacks is added to the other two"
    assert found.own_share > 0.75
    assert found.limited
    mutual, to_prior, total = terms(found, "_leave_one_out")
    assert mutual > exact
    assert max(to_prior, total) < 0
    mutual, to_prior, total = terms(found, "_mixture")
    # Of a sample of images: the mean KL has the standard deviation sqrt(size / 2) (1 - variance) for each image.
    assert mutual == pytest.approx(exact, abs=4 * math.sqrt(size / 2 / count))
    assert mutual + to_prior == pytest.approx(found.mean_kl)
    assert to_prior == pytest.approx(0, abs=0.01)
    assert total == pytest.approx(0, abs=3 * size / count), "the marginals' own terms remain"


@pytest.mark.parametrize("size", [8, 32])
def test_the_mixture_s_information_is_that_of_latents_in_any_scale(size: int) -> None:
    """Where q(z) is not the prior, so that the mixture must be fitted: KL(N(1, 4) || N(0, 1)) in each latent."""
    moments, exact = gaussian_case(1000, size)
    found = information(Points(1 + 2 * moments.z, 4 * moments.variance), seed=0)
    assert found.mixture_components > 0
    assert found.mutual_information_mixture == pytest.approx(exact, abs=4 * math.sqrt(size / 2 / 1000))
    assert found.aggregate_kl_mixture == pytest.approx(size * (2 - math.log(2)), rel=0.05)
    assert found.total_correlation_mixture == pytest.approx(0, abs=0.01 * size)


def test_with_many_images_the_three_estimates_agree() -> None:
    moments, exact = gaussian_case(20_000, 2)
    found = information(moments, seed=0)
    assert found.own_share < 0.01
    assert not found.limited
    for ending in ("", "_leave_one_out", "_mixture"):
        error = 4 * getattr(found, f"mutual_information{ending}_error") + 0.03
        assert getattr(found, f"mutual_information{ending}") == pytest.approx(exact, abs=error)


def test_the_mixture_of_other_images_is_near_q_where_q_is_a_mixture() -> None:
    truth, variance = known("full"), 0.02
    mean = draws(truth, 3000)
    # In the prior's scale, as the measure expects it: the last latent is near 40.
    shift = torch.tensor([0.0, 0.0, 40.0], dtype=torch.float64)
    wide = Mixture(
        truth.weights, truth.means - shift, truth.covariances + variance * torch.eye(3).double(), "full"
    )
    points = Points(mean - shift, torch.full_like(mean, variance))
    found = information(points, seed=0)
    z = draws(wide, 100_000, seed=1)
    entropy = -float(log_density(wide, z).mean())
    exact = entropy - 1.5 * (1 + math.log(2 * math.pi * variance))
    assert (found.mixture_components, found.mixture_covariance) == (10, "full")
    assert found.mutual_information_mixture == pytest.approx(exact, abs=0.1)
    assert found.mutual_information < exact < found.mutual_information_leave_one_out


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e8])
def test_latents_far_from_zero_keep_their_information(ratio: float) -> None:
    """Two clusters `ratio` deviations apart: squares of 1e16 expanded in float64 are off by several nats."""
    z = gaussian_case(200, 4).moments.z
    side = torch.where(torch.arange(200) % 3 > 0, 1.0, -1.0).double()[:, None]
    found = information(Points(z + ratio * side, torch.ones_like(z)), seed=0)
    near = information(Points(z + 100 * side, torch.ones_like(z)), seed=0)
    assert found.mutual_information <= math.log(200) + 1e-12
    for name in ("own_share", "mutual_information", "mutual_information_leave_one_out"):
        assert getattr(found, name) == pytest.approx(getattr(near, name), abs=1e-6)


def test_separate_posteriors_have_all_of_ln_n_and_more_by_the_mixture() -> None:
    points = Points(1000.0 * torch.arange(64)[:, None].double(), torch.ones(64, 1).double())
    found = information(points, seed=0)
    assert found.own_share == 1.0
    assert found.mutual_information == pytest.approx(math.log(64))
    uniform = math.log(64_000) - 0.5 * math.log(2 * math.pi * math.e)
    assert uniform < found.mutual_information_mixture < uniform + 1
    assert found.mutual_information_leave_one_out > 10_000


def test_two_images_can_be_measured() -> None:
    found = information(Points(torch.tensor([[0.0], [3.0]]).double(), torch.ones(2, 1).double()), seed=0)
    assert all(math.isfinite(value) for value in found if not isinstance(value, str))
    assert found.mutual_information <= math.log(2) + 1e-12


@pytest.mark.parametrize("expanded", [densities.EXPANDED, 30.0, 0.0])
def test_densities_are_brute_force_s(expanded: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By products, by both, and by differences alone."""
    monkeypatch.setattr(densities, "EXPANDED", expanded)
    monkeypatch.setattr(densities, "VALUES", 160)  # several batches
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, 3, generator=generator).double() * torch.tensor([1.0, 2.0, 0.5])
    points = Points(mean, 0.3 + torch.rand(50, 3, generator=generator).double())
    z = torch.randn(7, 3, generator=generator).double()
    each = Normal(points.z, points.variance.sqrt()).log_prob(z[:, None])  # [7, 50, 3]
    torch.testing.assert_close(aggregate_log_density(points, z), each.sum(2).logsumexp(1) - math.log(50))
    torch.testing.assert_close(marginal_log_densities(points, z), each.logsumexp(1) - math.log(50))
    numbers = torch.tensor([0, 3, 15, 16, 17, 40, 49])
    joint = each.sum(2)
    joint[torch.arange(7), numbers] = -math.inf
    torch.testing.assert_close(others_log_density(points, z, numbers), joint.logsumexp(1) - math.log(49))


def test_as_many_latents_as_no_full_covariance_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More latents than `ONE_FULL_LATENTS` get a diagonal Gaussian, and more than `FULL_LATENTS` ten diagonal ones."""
    moments, exact = gaussian_case(1000, 8)
    points = Points(1 + 2 * moments.z, 4 * moments.variance)
    for one, several in ((4, 4), (8, 4)):
        monkeypatch.setattr("vaescale.aggregate.cross_fit.ONE_FULL_LATENTS", one)
        monkeypatch.setattr("vaescale.aggregate.cross_fit.FULL_LATENTS", several)
        found = information(points, seed=0)
        assert found.mutual_information_mixture == pytest.approx(exact, abs=0.3)
