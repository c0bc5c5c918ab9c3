"""The hierarchical model against Gaussian algebra, where everything is linear and log p(x) is known.

z1 ~ N(0, s1^2), z2 | z1 ~ N(a z1, s2^2), x | z2 ~ N(w z2, sigma^2) for each of 4 pixels
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vaescale import noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import LIKELIHOODS, GaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.ladder import LadderVAE
from vaescale.models.posterior import LOG_SIGMA_BOUND
from vaescale.networks.config import LadderConfig
from vaescale.networks.stages import Block

S1, A, S2, SIGMA = 1.3, 0.8, 0.6, 0.4
W = torch.tensor([0.5, -1.0, 0.3, 0.9], dtype=torch.float64)
X = torch.tensor([[0, 255, 100, 30], [200, 10, 60, 255], [128, 128, 0, 0]], dtype=torch.uint8).view(
    3, 1, 2, 2
)


def unbounded(log_sigma: float) -> float:
    """The raw value whose bounded one this is."""
    return LOG_SIGMA_BOUND * math.atanh(log_sigma / LOG_SIGMA_BOUND)


class Linear(nn.Module):
    """A group with p(z | here) = N(gain here, prior^2) and q(z | here, x) = N(up here + from_x . x, own^2)."""

    def __init__(self, gain: float, prior: float, up: float, from_x: Tensor, own: float) -> None:
        super().__init__()
        self.block, self.gain, self.up, self.from_x = Block(1, 1), gain, up, from_x
        self.raw_prior, self.raw_own = unbounded(math.log(prior)), unbounded(math.log(own))

    def prior(self, here: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.gain * here
        return torch.cat([mean, torch.full_like(mean, self.raw_prior)], dim=1), here

    def posterior(self, here: Tensor, seen: Tensor) -> Tensor:
        mean = self.up * here + (seen.flatten(1) @ self.from_x).view(-1, 1, 1, 1)
        return torch.cat([mean, torch.full_like(mean, self.raw_own)], dim=1)

    def with_latents(self, here: Tensor, z: Tensor) -> Tensor:
        return z


class TwoLevels(nn.Module):
    """What `LadderNetwork` offers, with x itself as the only map that the groups see."""

    checkpointing = False

    def __init__(self, groups: list[Linear]) -> None:
        super().__init__()
        self.groups, self.scale = nn.ModuleList(groups), nn.Parameter(torch.ones((), dtype=torch.float64))

    def bottom_up(self, x: Tensor) -> dict[int, Tensor]:
        return {1: x}

    def start(self, rows: int) -> dict[int, Tensor]:
        return {1: torch.zeros(rows, 1, 1, 1, dtype=torch.float64)}

    def enter(self, block: Block, maps: dict[int, Tensor], *, like: Tensor) -> Tensor:
        return maps[block.resolution]

    def finish(self, maps: dict[int, Tensor]) -> Tensor:
        return self.scale * (maps[1].flatten(1) * W).view(-1, 1, 2, 2)


def two_levels(first: dict[str, object], second: dict[str, object]) -> LadderVAE:
    config = LadderConfig(latent_dim=1, width=4, encoder=("2d2", "1"), decoder=("1x2", "2m1"))
    likelihood = GaussianConfig(sigma=SIGMA, mean="identity")
    model = build_vae(config, DiagonalConfig(), likelihood, image_size=2, channels=1).double()
    assert isinstance(model, LadderVAE)
    groups = [Linear(gain=0.0, prior=S1, up=0.0, **first), Linear(gain=A, prior=S2, **second)]
    model.network = TwoLevels(groups)
    return model.eval()


def joint() -> tuple[MultivariateNormal, Tensor]:
    """p(x), and the covariance of (z1, z2, x)."""
    var1 = S1**2
    var2 = A**2 * var1 + S2**2
    latents = torch.tensor([[var1, A * var1], [A * var1, var2]], dtype=torch.float64)
    to_x = torch.stack([torch.zeros_like(W), W])  # [2, 4]
    cross = latents @ to_x
    own = to_x.T @ cross + SIGMA**2 * torch.eye(4, dtype=torch.float64)
    everything = torch.cat([torch.cat([latents, cross], 1), torch.cat([cross.T, own], 1)])
    return MultivariateNormal(torch.zeros(4, dtype=torch.float64), own), everything


def exact_posterior() -> tuple[dict[str, object], dict[str, object]]:
    """q(z1|x) and q(z2|z1, x) by conditioning the joint Gaussian."""
    _, covariance = joint()
    given_x = torch.linalg.solve(covariance[2:, 2:], covariance[2:, 0])
    variance = covariance[0, 0] - covariance[0, 2:] @ given_x
    first = {"from_x": given_x, "own": math.sqrt(variance)}
    known = [0, 2, 3, 4, 5]
    weights = torch.linalg.solve(covariance[known][:, known], covariance[known, 1])
    variance = covariance[1, 1] - covariance[1, known] @ weights
    return first, {"up": float(weights[0]), "from_x": weights[1:], "own": math.sqrt(variance)}


def terms(model: LadderVAE, *, draws: int, samples: int = 0):
    """Of the three images, `draws` times each."""
    images = X.repeat_interleave(draws, 0)
    stream = noise.Stream(0, 0, torch.arange(len(images)))
    with torch.no_grad():
        return model(images, stream, torch.ones(len(images), dtype=torch.bool), samples)


def evidence() -> Tensor:
    return joint()[0].log_prob(X.flatten(1).double() / 255)


def test_with_the_exact_posterior_every_draw_gives_log_p() -> None:
    model = two_levels(*exact_posterior())
    got = terms(model, draws=1, samples=7)
    torch.testing.assert_close(got.log_weights, evidence()[:, None].expand(3, 7), rtol=1e-6, atol=1e-6)
    many = terms(model, draws=40_000)
    elbo = (many.log_px - many.kl.sum(1)).view(3, -1)
    torch.testing.assert_close(elbo.mean(1), evidence(), rtol=0, atol=5 * float(elbo.std(1).max()) / 200)


def test_the_elbo_is_that_of_gaussian_algebra() -> None:
    """A posterior that is not exact: E[log p(x|z2)] and both KLs in closed form, E over z1 of the second by its moments."""
    c1, c2 = torch.tensor([0.2, -0.3, 0.1, 0.4]).double(), torch.tensor([0.5, -0.2, 0.3, 0.1]).double()
    up, own1, own2 = 0.3, 0.7, 0.5
    model = two_levels({"from_x": c1, "own": own1}, {"up": up, "from_x": c2, "own": own2})
    x = X.flatten(1).double() / 255
    mean1, offset = x @ c1, x @ c2
    kl1 = kl_divergence(Normal(mean1, own1), Normal(0.0, S1))
    # q(z2|z1) - p(z2|z1) have means apart by (up - A) z1 + offset.
    apart = ((up - A) * mean1 + offset) ** 2 + (up - A) ** 2 * own1**2
    kl2 = math.log(S2 / own2) + (own2**2 + apart) / (2 * S2**2) - 0.5
    mean2, var2 = up * mean1 + offset, up**2 * own1**2 + own2**2
    squares = (x - mean2[:, None] * W).square().sum(1) + var2 * W.square().sum()
    log_px = -0.5 * squares / SIGMA**2 - 4 * math.log(SIGMA) - 2 * math.log(2 * math.pi)
    many = terms(model, draws=100_000)
    for got, expected in ((many.kl[:, 0], kl1), (many.kl[:, 1], kl2), (many.log_px, log_px)):
        by_image = got.view(3, -1)
        error = 5 * float(by_image.std(1).max()) / math.sqrt(by_image.shape[1])
        torch.testing.assert_close(by_image.mean(1), expected, rtol=0, atol=error + 1e-6)
    assert ((log_px - kl1 - kl2) < evidence()).all()


def test_importance_weights_close_the_gap() -> None:
    c = torch.tensor([0.2, -0.3, 0.1, 0.4]).double()
    model = two_levels({"from_x": c, "own": 1.0}, {"up": 0.6, "from_x": c, "own": 0.7})
    got = terms(model, draws=1, samples=20_000)
    bound = torch.logsumexp(got.log_weights, 1) - math.log(20_000)
    torch.testing.assert_close(bound, evidence(), rtol=0, atol=0.05)
    many = terms(model, draws=5000)
    assert ((many.log_px - many.kl.sum(1)).view(3, -1).mean(1) < evidence() - 0.1).all()


def test_draws_of_both_groups_together_have_the_posterior_s_moments() -> None:
    """Under the exact posterior (z1, z2) given x is one Gaussian, whose covariance is that of the joint conditioned on x."""
    model = two_levels(*exact_posterior())
    x = model.target(X, noise.Stream(0, 0, torch.arange(3)))
    with torch.no_grad():
        z = model.joint_draws(x, noise.Stream(0, 0, torch.arange(3)), 60_000, 2)
    _, covariance = joint()
    cross, own = covariance[:2, 2:], covariance[2:, 2:]
    mean = x.flatten(1) @ torch.linalg.solve(own, cross.T)
    conditioned = covariance[:2, :2] - cross @ torch.linalg.solve(own, cross.T)
    torch.testing.assert_close(z.mean(1), mean, rtol=0, atol=0.02)
    for rows in z:
        torch.testing.assert_close(torch.cov(rows.T), conditioned, rtol=0.03, atol=0.01)


def test_means_of_groups_are_those_of_the_exact_posterior() -> None:
    """Gaussian: the mean of z2 given z1 at its own mean is its mean over z1."""
    model = two_levels(*exact_posterior())
    x = model.target(X, noise.Stream(0, 0, torch.arange(3)))
    with torch.no_grad():
        both, top = model.joint_means(x, 2), model.joint_means(x, 1)
    _, covariance = joint()
    mean = x.flatten(1) @ torch.linalg.solve(covariance[2:, 2:], covariance[:2, 2:].T)
    torch.testing.assert_close(both, mean)
    torch.testing.assert_close(top, mean[:, :1])


def test_the_prior_of_both_groups_is_a_density() -> None:
    model = two_levels(*exact_posterior())
    _, covariance = joint()
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance[:2, :2])
    torch.testing.assert_close(model.prior_log_density(z), together.log_prob(z))
    torch.testing.assert_close(model.prior_log_density(z[:, :1]), Normal(0.0, S1).log_prob(z[:, 0]))


def test_all_groups_given_leave_nothing_to_draw(ladder: LadderVAE) -> None:
    size = sum(ladder.group_sizes)
    z = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (ladder.decode(z, noise.Stream(seed, 0, torch.arange(2))) for seed in (0, 1))
        first = sum(ladder.group_sizes[:2])
        some, others = (
            ladder.decode(z[:, :first], noise.Stream(seed, 0, torch.arange(2))) for seed in (0, 1)
        )
    assert torch.equal(one, other)
    assert not torch.equal(some, others)
    with pytest.raises(AssertionError, match="first groups"):
        ladder.decode(z[:, :-1], noise.Stream(0, 0, torch.arange(2)))


@pytest.fixture
def ladder() -> LadderVAE:
    torch.manual_seed(0)
    config = LadderConfig(latent_dim=3, width=12)
    model = build_vae(config, DiagonalConfig(), GaussianConfig(sigma=0.3), image_size=8, channels=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert isinstance(model, LadderVAE)
    return model


def test_checkpointing_changes_memory_and_nothing_else(ladder: LadderVAE) -> None:
    images = torch.randint(
        0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    found = []
    for checkpointing in (False, True):
        ladder.network.checkpointing = checkpointing
        ladder.zero_grad()
        got = ladder(images, noise.Stream(0, 3, torch.arange(4)), torch.ones(4, dtype=torch.bool))
        (got.kl.sum(1) - got.log_px).mean().backward()
        found.append([got.log_px, got.kl, *(parameter.grad for parameter in ladder.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_groups_have_noise_of_their_own(ladder: LadderVAE) -> None:
    """Two groups of one shape that shared a draw would be no independent latents."""
    drawn = {
        number: noise.normal(
            noise.Stream(0, 0, torch.arange(4)), noise.POSTERIOR + number, (3, 8, 8)
        ).flatten()
        for number in range(len(ladder.group_sizes))
    }
    correlation = torch.corrcoef(torch.stack(list(drawn.values())))
    assert (correlation - torch.eye(len(drawn))).abs().max() < 0.2


def test_the_sampled_kl_is_the_analytic_one_on_average(ladder: LadderVAE) -> None:
    image = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        got = ladder(
            image,
            noise.Stream(0, 0, torch.zeros(1, dtype=torch.int64)),
            torch.ones(1, dtype=torch.bool),
            4000,
        )
    sampled = got.log_px + 0  # log_weights = log_px - (log q - log p), by draw
    estimate = float((sampled - got.log_weights.mean(1)).item())
    assert estimate == pytest.approx(float(got.kl.sum()), rel=0.02)


def test_temperature_and_the_prior(ladder: LadderVAE) -> None:
    stream = noise.Stream(0, 0, torch.arange(200))
    with torch.no_grad():
        spread = {t: float(ladder.from_prior(stream, t).std(0).mean()) for t in (1e-6, 0.5, 1.0)}
    assert spread[1e-6] < 1e-4 < spread[0.5] < spread[1.0]


LIKELIHOOD_SECTIONS = [
    *({"kind": kind} for kind in LIKELIHOODS),
    *({"kind": "gaussian", "sigma": sigma} for sigma in ("shared", "predicted", "optimal_per_pixel")),
]


@pytest.mark.parametrize("section", LIKELIHOOD_SECTIONS, ids=lambda section: "-".join(section.values()))
def test_every_likelihood_goes_with_a_ladder(section: dict[str, str]) -> None:
    torch.manual_seed(0)
    likelihood = OneOf(LIKELIHOODS).validate(section)
    config = LadderConfig(latent_dim=2, width=8)
    model = build_vae(config, DiagonalConfig(), likelihood, image_size=8, channels=3).train()
    images = torch.randint(
        0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    stream, mask = noise.Stream(0, 0, torch.arange(3)), torch.ones(3, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images, stream, mask)
    (got.kl.sum(1) - got.log_px).mean().backward()
    model.likelihood.end_step()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    with torch.no_grad():
        params = model.eval().from_prior(stream)
        assert model.likelihood.sample(params, stream).shape == (3, 3, 8, 8)


def test_the_top_group_is_inferred_scored_and_decoded_by_itself() -> None:
    network = LadderConfig(latent_dim=3, width=8)
    likelihood = OneOf(LIKELIHOODS).validate({"kind": "gaussian"})
    torch.manual_seed(0)
    model = build_vae(network, DiagonalConfig(), likelihood, image_size=8, channels=1).eval()
    assert isinstance(model, LadderVAE)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its start, where priors are N(0, I)
            parameter.add_(0.05 * torch.randn_like(parameter))
        stream = noise.Stream(4, 0, torch.arange(5))
        seen: list[Tensor] = []
        z1 = noise.normal(stream, noise.PRIOR, model.latent_shape)
        _, prior = model._top(5, like=torch.zeros(5))
        top = prior.sample(z1)
        assert torch.equal(model.decode(top.flatten(1), stream), model.from_prior(stream))
        assert not torch.equal(model.decode(top.flatten(1) + 1, stream), model.from_prior(stream))
        expected = Normal(prior.mu, prior.log_sigma.exp()).log_prob(top).flatten(1).sum(1)
        torch.testing.assert_close(model.prior_log_density(top.flatten(1)), expected, rtol=1e-4, atol=1e-3)
        x = torch.rand(5, 1, 8, 8)
        q = model.posterior(x)
        original = model._posterior

        def watched(group, here, seen_map, own_prior):
            seen.append(original(group, here, seen_map, own_prior).mu)
            return original(group, here, seen_map, own_prior)

        model._posterior = watched  # type: ignore[method-assign]
        model.infer(model.encode(x), stream, 1, False)
        torch.testing.assert_close(seen[0], q.mu)
        assert q.mu.shape == (5, *model.latent_shape)
        assert model.latent_dim == model.group_sizes[0]
