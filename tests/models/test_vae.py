"""The model against torch.distributions and a Monte-Carlo estimate; its noise against position."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vaescale import noise
from vaescale.likelihoods.config import GaussianConfig, StructuredGaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.posterior import LOG_SIGMA_BOUND, Diagonal, Gaussian, kl
from vaescale.models.vae import VAE, to_unit
from vaescale.networks.config import ConvConfig


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    network = ConvConfig(latent_dim=3, widths=(8,))
    return build_vae(network, DiagonalConfig(), GaussianConfig(sigma=0.3), image_size=4, channels=1).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def stream(slots: torch.Tensor, *, step: int = 0) -> noise.Stream:
    return noise.Stream(0, step, slots)


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


def test_kl_agrees_with_torch() -> None:
    torch.manual_seed(0)
    q, p = (Gaussian(torch.randn(7, 4), torch.randn(7, 4)) for _ in range(2))
    own = Normal(q.mu, q.log_sigma.exp())
    torch.testing.assert_close(kl(q), kl_divergence(own, Normal(0.0, 1.0)))
    torch.testing.assert_close(kl(q, p), kl_divergence(own, Normal(p.mu, p.log_sigma.exp())))
    assert kl(Gaussian(torch.zeros(1, 4), torch.zeros(1, 4))).abs().max() == 0
    assert kl(q, q).abs().max() < 1e-6
    z = torch.randn(7, 4)
    torch.testing.assert_close(q.log_density(z), own.log_prob(z))


def test_log_sigma_is_bounded_smoothly() -> None:
    raw = torch.tensor([[0.0, -1e4, 0.0, 1e4], [0.0, 0.1, 0.0, -0.1]], requires_grad=True)
    _, log_sigma = Diagonal(DiagonalConfig(), 2)(raw, None)
    assert log_sigma.abs().max() <= LOG_SIGMA_BOUND
    torch.testing.assert_close(log_sigma[1], raw[1, 2:], rtol=1e-3, atol=1e-3)
    moderate = torch.full((1, 4), 20.0, requires_grad=True)
    Diagonal(DiagonalConfig(), 2)(moderate, None).log_sigma.sum().backward()
    assert (moderate.grad[:, 2:] > 0).all(), "the bound must leave a gradient back"


def test_terms_are_the_elbo_s(model: VAE, images: torch.Tensor) -> None:
    terms = model(images, stream(torch.arange(5)), everything(5))
    assert terms.log_px.shape == (5,)
    assert terms.kl.shape == (5, 1)
    assert terms.mu.shape == (5, 3)
    x = images.double() / 255
    mu, log_sigma = model.posterior(to_unit(images))
    epsilon = noise.normal(stream(torch.arange(5)), noise.POSTERIOR, (3,))
    mean = torch.sigmoid(model.decode(mu + log_sigma.exp() * epsilon)).double()
    expected = Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(terms.log_px.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        terms.squared_error.double(), (x - mean).square().flatten(1).sum(1), rtol=1e-5, atol=1e-5
    )
    expected_kl = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).sum(1, keepdim=True)
    torch.testing.assert_close(terms.kl, expected_kl)


@pytest.mark.parametrize("draws", [0, 3])
def test_terms_that_only_metrics_read_may_be_left_out(draws: int, model: VAE, images: torch.Tensor) -> None:
    arguments = (images, stream(torch.arange(len(images))), everything(len(images)), draws, False, None)
    whole, few = (model(*arguments, measured) for measured in (True, False))
    left_out = {"squared_error", "variance", "unit_mean", "unit_square"}
    assert whole.shown == few.shown == (), "a model without a second player"
    for name in [name for name in whole._fields if name != "shown"]:
        if name in left_out:
            assert getattr(few, name).shape == (len(images), 0)
            assert getattr(whole, name).shape[0] == len(images)
        else:
            assert torch.equal(getattr(few, name), getattr(whole, name)), name


def test_the_elbo_is_below_the_evidence(model: VAE, images: torch.Tensor) -> None:
    """log p(x) from 200,000 prior draws, against the mean of many one-sample ELBOs."""
    with torch.no_grad():
        draws = noise.normal(stream(torch.arange(200_000)), noise.PRIOR, (3,))
        means = torch.sigmoid(model.decode(draws))
        log_px = Normal(means, 0.3).log_prob(to_unit(images[:1])).flatten(1).sum(1)
        evidence = torch.logsumexp(log_px.double(), 0) - torch.log(torch.tensor(200_000.0))
        many = images[:1].expand(2000, -1, -1, -1)
        terms = model(many, stream(torch.arange(2000)), everything(2000))
        elbo = (terms.log_px - terms.kl.sum(1)).mean()
    assert elbo < evidence


def test_noise_depends_on_the_slot_and_the_step_alone(model: VAE, images: torch.Tensor) -> None:
    whole = model(images, stream(torch.arange(5)), everything(5)).log_px
    part = model(images[3:], stream(torch.tensor([3, 4])), everything(2)).log_px
    torch.testing.assert_close(part, whole[3:], rtol=1e-5, atol=1e-5)
    later = model(images, stream(torch.arange(5), step=1), everything(5)).log_px
    assert not torch.allclose(later, whole)


def test_autocast_stops_before_the_likelihood(images: torch.Tensor) -> None:
    """Under bf16 log p(x|z) is within 1e-5 of what float64 makes of the decoder's bf16 output: only the network rounds."""
    torch.manual_seed(0)
    for likelihood in (GaussianConfig(sigma="predicted"), StructuredGaussianConfig()):
        network = ConvConfig(latent_dim=3, widths=(8,))
        model = build_vae(network, DiagonalConfig(), likelihood, image_size=4, channels=1).eval()
        decoded = []
        model.network.decoder.register_forward_hook(lambda *call, to=decoded: to.append(call[2]))
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(images, stream(torch.arange(5)), everything(5))
        assert decoded[0].dtype == torch.bfloat16
        assert terms.log_px.dtype == terms.kl.dtype == torch.float32
        expected = model.likelihood.double().log_prob(
            images.double() / 255, decoded[0].double(), everything(5)
        )
        torch.testing.assert_close(terms.log_px.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_reported_variance_is_that_of_the_samples(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = ConvConfig(latent_dim=3, widths=(8,))
    model = build_vae(
        network, DiagonalConfig(), GaussianConfig(sigma="predicted"), image_size=4, channels=1
    ).eval()
    with torch.no_grad():
        terms = model(images[:1], stream(torch.arange(1)), everything(1))
        z = terms.mu + model.posterior(to_unit(images[:1])).log_sigma.exp() * noise.normal(
            stream(torch.arange(1)), noise.POSTERIOR, (3,)
        )
        params = model.decode(z).expand(50_000, -1, -1, -1)
        draws = model.likelihood.sample(params, stream(torch.arange(50_000)))
    assert float(terms.variance) == pytest.approx(float(draws.var(0).sum()), rel=0.02)
    known = build_vae(network, DiagonalConfig(), GaussianConfig(sigma=0.3), image_size=4, channels=1).eval()
    assert known(images, stream(torch.arange(5)), everything(5)).variance.isnan().all(), (
        "sigma says it already"
    )
