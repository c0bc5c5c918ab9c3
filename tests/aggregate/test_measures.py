"""What is measured of latents, against closed forms: linear-Gaussian models, known aggregates and scikit-learn's PCA."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from tests.ranks import on_ranks
from vaescale import noise
from vaescale.aggregate import gaps
from vaescale.aggregate.collapse import DELTAS, EPSILONS, use_of
from vaescale.aggregate.gaps import inference_gaps
from vaescale.aggregate.information import information
from vaescale.aggregate.refinement import mean_log_sigma, refine
from vaescale.aggregate.sampling import Decoding, image_of, line, parse_decoding, plane, quantiles
from vaescale.aggregate.variance import data_covariance, model_split, ppca_split
from vaescale.data.lookup import evenly
from vaescale.errors import UserError
from vaescale.likelihoods.config import GaussianConfig
from vaescale.mixtures.points import Points, Scaled
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.flat import FlatVAE
from vaescale.networks.config import LinearConfig

SIGMA = 0.4


def gaussians(count: int, spread: Tensor, variance: float) -> Points:
    """Means from N(0, spread^2), one variance for all: the aggregate is N(0, spread^2 + variance) but for the sampling."""
    size = len(spread)
    mean = noise.normal(noise.Stream(9, 0, torch.arange(count)), noise.PRIOR, (size,)).double() * spread
    return Points(mean, torch.full_like(mean, variance))


def test_information_of_a_gaussian_aggregate_is_the_closed_form() -> None:
    spread, variance = torch.tensor([1.2, 0.4]).double(), 0.09
    found = information(gaussians(20_000, spread, variance), seed=0)
    aggregate = Normal(torch.zeros(2).double(), (spread.square() + variance).sqrt())
    mutual = float((0.5 * ((spread.square() + variance) / variance).log()).sum())
    to_prior = float(kl_divergence(aggregate, Normal(torch.zeros(2).double(), torch.ones(2).double())).sum())
    assert found.mutual_information == pytest.approx(mutual, abs=4 * found.mutual_information_error + 0.01)
    assert found.aggregate_kl == pytest.approx(to_prior, abs=4 * found.aggregate_kl_error + 0.01)
    assert found.total_correlation == pytest.approx(0, abs=4 * found.total_correlation_error + 0.02)
    assert found.mean_kl == pytest.approx(mutual + to_prior, rel=0.02)
    both = found.mutual_information + found.aggregate_kl
    assert both == pytest.approx(
        found.mean_kl, abs=4 * (found.mutual_information_error + found.aggregate_kl_error)
    )
    assert found.total_correlation + found.marginal_kl == pytest.approx(found.aggregate_kl, abs=0.3)


def test_correlated_means_have_total_correlation() -> None:
    first = gaussians(20_000, torch.ones(1).double(), 0.1).z
    second = 0.8 * first + 0.6 * gaussians(20_000, torch.ones(2).double(), 0.1).z[:, 1:]
    points = Points(torch.cat([first, second], 1), torch.full((20_000, 2), 0.1).double())
    correlation = 0.8 / 1.1  # covariance 0.8, variances 1 + 0.1
    found = information(points, seed=0)
    expected = -0.5 * math.log(1 - correlation**2)
    assert found.total_correlation == pytest.approx(expected, abs=4 * found.total_correlation_error)


def test_as_many_posteriors_as_images_apart_give_ln_n() -> None:
    points = Points(1000.0 * torch.arange(64)[:, None].double(), torch.ones(64, 1).double())
    assert information(points, seed=0).mutual_information == pytest.approx(math.log(64))


def _inform_on_rank(rank: int, ranks: int) -> Tensor:
    whole = gaussians(301, torch.tensor([1.2, 0.4]).double(), 0.09)
    numbers = torch.arange(rank, 301, ranks)
    share = Points(whole.z[numbers], whole.variance[numbers], numbers=numbers)
    use, found = use_of(share), information(share, seed=0, queries=100)
    return torch.cat(
        [
            torch.tensor([value for value in found if not isinstance(value, str)]).double(),
            use.latent_kl,
            use.collapsed.flatten(),
        ]
    )


@pytest.mark.distributed
def test_the_number_of_ranks_does_not_matter(tmp_path: Path) -> None:
    (one,) = on_ranks(tmp_path, _inform_on_rank, ranks=1)
    (tmp_path / "3").mkdir()
    for other in on_ranks(tmp_path / "3", _inform_on_rank, ranks=3):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_use_counts_what_is_active_and_collapsed() -> None:
    """Latent 0 is used by all images, 1 by none, 2 by a third of them."""
    mean = torch.zeros(300, 3).double()
    mean[:, 0] = torch.linspace(-2, 2, 300)
    mean[:100, 2] = 1.0
    variance = torch.tensor([0.01, 1.0, 1.0]).double().expand(300, 3)
    use = use_of(Points(mean, variance))
    wanted = kl_divergence(Normal(mean, variance.sqrt()), Normal(torch.zeros(3).double(), 1.0)).mean(0)
    torch.testing.assert_close(use.latent_kl, wanted)
    assert use.active.tolist() == [True, False, True]
    small = EPSILONS.index(0.1)
    by_delta = dict(zip(DELTAS, use.collapsed[:, small].tolist(), strict=True))
    assert by_delta == {0.01: pytest.approx(1 / 3), 0.1: pytest.approx(1 / 3), 0.5: pytest.approx(2 / 3)}
    assert (use.collapsed.diff(dim=1) >= 0).all()


def test_the_channels_of_a_map_are_its_latents() -> None:
    """Two channels of 3 places: KL is summed over the places, a mean that moves at one of them makes the channel active."""
    mean = torch.zeros(200, 6).double()
    mean[:, 4] = torch.linspace(-1, 1, 200)
    variance = torch.full((200, 6), 0.5).double()
    use = use_of(Points(mean, variance), places=3)
    wanted = kl_divergence(Normal(mean, variance.sqrt()), Normal(torch.zeros(6).double(), 1.0)).mean(0)
    torch.testing.assert_close(use.latent_kl, wanted.view(2, 3).sum(1))
    assert use.active.tolist() == [False, True]
    assert use.collapsed.shape == (len(DELTAS), len(EPSILONS))


def test_scaled_moments_are_those_of_scaled_latents() -> None:
    points = gaussians(30, torch.tensor([1.0, 2.0]).double(), 0.3)
    shift, scale = torch.tensor([0.5, -1.0]).double(), torch.tensor([2.0, 0.1]).double()
    scaled = Scaled(points, shift, scale)
    wanted = Points((points.z - shift) / scale, points.variance / scale.square())
    numbers = torch.tensor([0, 7, 29])
    assert (scaled.size, scaled.count) == (2, 30)
    torch.testing.assert_close(scaled.rows(numbers), wanted.rows(numbers))
    torch.testing.assert_close(scaled.variances(numbers), wanted.variances(numbers))
    for one, other in zip(next(scaled.parts()), next(wanted.parts()), strict=True):
        torch.testing.assert_close(one, other)


class Linear(nn.Module):
    """x = W z + noise on 4 pixels, and an encoder q(z|x) = N(A x, own^2)."""

    latent_shape = (2,)

    def __init__(self, from_x: Tensor, own: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = torch.randn(4, 2, generator=generator).double()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.from_x, self.own = from_x, own

    def encode(self, x: Tensor) -> Tensor:
        mean = x.flatten(1) @ self.from_x.T
        raw = 8 * torch.atanh(self.own.log() / 8)
        return torch.cat([mean, raw.expand_as(mean)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return self.gain * (z @ self.w.T).view(-1, 1, 2, 2)


def linear_model(from_x: Tensor | None = None, own: Tensor | None = None) -> FlatVAE:
    """Its encoder is the best diagonal Gaussian unless it is given."""
    likelihood = GaussianConfig(sigma=SIGMA, mean="identity")
    model = build_vae(
        LinearConfig(latent_dim=2), DiagonalConfig(), likelihood, image_size=2, channels=1
    ).double()
    assert isinstance(model, FlatVAE)
    w = Linear(torch.zeros(2, 4), torch.ones(2)).w
    precision = torch.eye(2).double() + w.T @ w / SIGMA**2
    best_mean = torch.linalg.solve(precision, w.T) / SIGMA**2
    # argmin_q KL(q || N(m, P^-1)) over diagonal q has the means m and variances 1 / P_jj
    best_own = precision.diagonal().rsqrt()
    model.network = Linear(best_mean if from_x is None else from_x, best_own if own is None else own)
    return model.eval()


def images() -> Tensor:
    return torch.randint(0, 256, (6, 1, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def exact_log_px(model: FlatVAE, x: Tensor) -> Tensor:
    w = model.network.w
    covariance = w @ w.T + SIGMA**2 * torch.eye(4).double()
    return MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x.flatten(1))


def test_gaps_of_a_linear_model_are_known() -> None:
    """The approximation gap is KL(best diagonal q || posterior), the amortization gap is what the encoder adds to it."""
    stream = noise.Stream(0, 0, torch.arange(6))
    best = linear_model()
    precision = torch.eye(2).double() + best.network.w.T @ best.network.w / SIGMA**2
    approximation = 0.5 * float(
        (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1]).detach()
    )
    assert approximation > 0.02
    off = linear_model(from_x=best.network.from_x + 0.1, own=best.network.own * 1.3)
    found = inference_gaps(off, images(), stream, steps=400, importance_samples=4000)
    x = off.target(images(), stream)
    torch.testing.assert_close(found.log_px, exact_log_px(off, x), rtol=0, atol=0.05)
    torch.testing.assert_close(
        found.approximation, torch.full((6,), approximation).double(), rtol=0, atol=0.06
    )
    q, truth = off.posterior(x), best.posterior(x)
    exact = kl_divergence(Normal(q.mu, q.log_sigma.exp()), Normal(torch.zeros(2).double(), 1.0)).sum(
        1
    ) - kl_divergence(Normal(truth.mu, truth.log_sigma.exp()), Normal(torch.zeros(2).double(), 1.0)).sum(1)
    expected_px = [
        -(
            (x.flatten(1) - one.mu @ off.network.w.T).square().sum(1)
            + (off.network.w.square() @ one.log_sigma.exp().square().T).sum(0)
        )
        / (2 * SIGMA**2)
        for one in (q, truth)
    ]
    torch.testing.assert_close(
        found.amortization, (exact + expected_px[1] - expected_px[0]).detach(), rtol=0.05, atol=0.1
    )
    assert all(parameter.grad is None for parameter in off.parameters())


def test_no_two_draws_of_the_gaps_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has 32 bits, and chunks are 2^20 steps apart: from 16,384 draws on, their noise repeated."""
    stream = noise.Stream(3, 0, torch.arange(2))
    addresses = [gaps._address(stream, chunk) for chunk in (*range(3), *range(4095, 4099), 8191, 8192)]
    assert len({(at.step, purpose) for at, purpose in addresses}) == len(addresses)
    assert all(at.step < noise.STEPS for at, _ in addresses)
    assert gaps._address(stream, 2) == (stream._replace(step=2 << 20), noise.POSTERIOR), "as it was"
    values = torch.stack([noise.normal(at, purpose, (2,)) for at, purpose in addresses])
    assert len(values.unique(dim=0)) == len(addresses)
    for wrong in ({"steps": 1 << 20, "importance_samples": 4}, {"steps": 3, "importance_samples": 1 << 31}):
        with pytest.raises(
            UserError, match="gaps have noise for 1048575 steps and 1073741824 importance samples"
        ):
            gaps.mean_gaps(None, None, 2, **wrong, seed=0)


def test_an_image_s_gaps_depend_on_no_other_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many draws a batch leaves room for at once."""
    monkeypatch.setattr("vaescale.aggregate.gaps.VALUES", 24 * 4)  # 4 draws of six images, 12 of two
    model, options = linear_model(), {"steps": 3, "importance_samples": 30}
    stream = noise.Stream(0, 0, torch.arange(6))
    together = inference_gaps(model, images(), stream, **options)
    two = inference_gaps(model, images()[:2], stream._replace(slots=torch.arange(2)), **options)
    for one, other in zip(together, two, strict=True):
        torch.testing.assert_close(one[:2], other)


def test_the_best_encoder_has_no_amortization_gap() -> None:
    found = inference_gaps(
        linear_model(), images(), noise.Stream(0, 0, torch.arange(6)), steps=50, importance_samples=200
    )
    assert found.amortization.abs().max() < 0.05


def test_the_variance_of_a_linear_model_splits_as_its_algebra_says() -> None:
    model = linear_model()
    z = noise.normal(noise.Stream(0, 0, torch.arange(50_000)), noise.PRIOR, (2,)).double()
    split = model_split(model, (model.decode(part) for part in torch.split(z, 5000)))
    assert split.observed == pytest.approx(4 * SIGMA**2)
    assert split.latent == pytest.approx(float(model.network.w.square().sum()), rel=0.02)


def test_ppca_s_split_is_scikit_learn_s() -> None:
    x = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(0)) ** 2
    covariance = data_covariance(torch.split(x, 64), 16)
    np.testing.assert_allclose(covariance, np.cov(x.flatten(1).double().T, bias=True), atol=1e-12)
    pca = PCA(5).fit(x.flatten(1).double().numpy())
    split = ppca_split(covariance, 5)
    assert split is not None
    unbiased = 399 / 400
    assert split.observed == pytest.approx(16 * pca.noise_variance_ * unbiased)
    assert split.latent == pytest.approx((pca.explained_variance_ - pca.noise_variance_).sum() * unbiased)
    assert split.total == pytest.approx(float(covariance.trace()))
    assert ppca_split(covariance, 16) is None


class Sure(nn.Module):
    """Stands for a model whose log sigma is |z - 1|^2 / 8 on each of 4 values."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = self
        self.dimensions = 4
        self.weight = nn.Parameter(torch.ones(()))

    def decode(self, z: Tensor, stream: noise.Stream) -> Tensor:
        return self.weight * z

    def variance(self, params: Tensor) -> Tensor:
        log_sigma = (params - 1).square().sum(1) / 8
        return torch.exp(2 * log_sigma)[:, None, None, None].expand(-1, 1, 2, 2)


def normal_density(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).sum(1)


def test_refinement_goes_down_to_where_sigma_is_least() -> None:
    model, stream = Sure(), noise.Stream(0, 0, torch.arange(5))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    done = refine(model, z, stream, normal_density, steps=1500, rate=0.02)
    torch.testing.assert_close(done.after, torch.ones(5, 2), rtol=0, atol=0.01)
    torch.testing.assert_close(done.log_sigma_before, (z - 1).square().sum(1) / 8)
    assert (done.log_sigma_after <= done.log_sigma_before).all()
    # 4 |z - 1|^2 / 8 + w |z|^2 / 2 is least at 1 / (1 + w)
    held = refine(model, z, stream, normal_density, steps=1500, rate=0.02, weight=3.0)
    torch.testing.assert_close(held.after, torch.full((5, 2), 0.25), rtol=0, atol=0.01)
    assert (held.density_after > done.density_after).all()
    assert torch.equal(done.before, z)
    assert model.weight.grad is None


def test_each_latent_is_refined_by_itself() -> None:
    model, z = Sure(), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    whole = refine(model, z, noise.Stream(0, 0, torch.arange(5)), normal_density, steps=20)
    one = refine(model, z[3:4], noise.Stream(0, 0, torch.arange(3, 4)), normal_density, steps=20)
    torch.testing.assert_close(whole.after[3:4], one.after)


def test_a_constant_sigma_cannot_be_refined() -> None:
    model = linear_model()
    with pytest.raises(UserError, match="sigma=predicted"):
        mean_log_sigma(model, torch.zeros(2, 2).double(), noise.Stream(0, 0, torch.arange(2)))


def test_decodings() -> None:
    model, stream = linear_model(), noise.Stream(0, 0, torch.arange(3))
    params = model.decode(torch.ones(3, 2).double())
    mean = image_of(model.likelihood, params, parse_decoding("mean"), stream)
    moved = image_of(model.likelihood, params, parse_decoding("offset:-1.5"), stream)
    torch.testing.assert_close(moved, mean - 1.5 * SIGMA)
    drawn = image_of(model.likelihood, params, parse_decoding("ancestral"), stream)
    assert not torch.equal(drawn, mean)
    assert parse_decoding("offset:2") == Decoding("offset", 2.0)
    for words in ("offset", "offset:", "offset:nan", "mean:1", "median", "offset:inf"):
        with pytest.raises(UserError, match="must be one of mean, ancestral, offset:ALPHA"):
            parse_decoding(words)


def test_lines_and_planes() -> None:
    one, other = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(line(one, other, 5)[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    grid = plane(quantiles(4)).view(4, 4, 2)
    assert grid[0, 0, 0] < 0 < grid[0, 3, 0], "x grows to the right"
    assert grid[0, 0, 1] > 0 > grid[3, 0, 1], "y grows upwards"
    torch.testing.assert_close(
        Normal(0.0, 1.0).cdf(grid[0, :, 0]), torch.tensor([0.125, 0.375, 0.625, 0.875])
    )


def test_evenly() -> None:
    assert evenly(10, 20).tolist() == list(range(10))
    assert evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
