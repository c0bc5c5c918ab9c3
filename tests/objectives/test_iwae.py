"""The importance-weighted bound: K = 1 is the ELBO, it grows with K to log p(x), and both gradients are its gradient."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from vaescale import noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import GaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.vae import VAE
from vaescale.networks.config import ConvConfig, LinearConfig
from vaescale.objectives.config import OBJECTIVES
from vaescale.objectives.iwae import log_mean_exp

IMAGE = torch.randint(0, 256, (1, 1, 2, 2), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@pytest.fixture
def model() -> VAE:
    """Linear and Gaussian, so that log p(x) is known; q is not p(z|x)."""
    torch.manual_seed(1)
    likelihood = GaussianConfig(sigma=0.5, mean="identity")
    return build_vae(
        LinearConfig(latent_dim=2), DiagonalConfig(), likelihood, image_size=2, channels=1
    ).double()


def bound(model: VAE, kind: dict[str, object], *, images: int, step: int = 0) -> Tensor:
    """The loss of the same image `images` times, each with draws of its own."""
    objective = OneOf(OBJECTIVES, default="elbo").validate({"kind": "iwae", **kind}).implement(model)
    stream = noise.Stream(0, step, torch.arange(images))
    mask = torch.ones(images, dtype=torch.bool)
    terms = model(
        IMAGE.expand(images, -1, -1, -1),
        stream,
        mask,
        objective.importance_samples,
        objective.doubly_reparameterized,
    )
    loss, pieces = objective(terms, stream)
    assert float(pieces["neg_iwae_nats"].detach()) == pytest.approx(float(loss.detach()))
    return loss


def evidence(model: VAE) -> float:
    weight, bias = model.network.decoder.weight, model.network.decoder.bias
    covariance = weight @ weight.T + 0.25 * torch.eye(4, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(bias, covariance)
    return float(exact.log_prob(IMAGE.flatten().double() / 255).detach())


def test_one_sample_is_the_elbo(model: VAE) -> None:
    """Draw by draw it is log p(x|z) + log p(z) - log q(z|x); on average log p(x|z) - KL."""
    stream = noise.Stream(0, 0, torch.arange(50_000))
    mask = torch.ones(50_000, dtype=torch.bool)
    with torch.no_grad():
        terms = model(IMAGE.expand(50_000, -1, -1, -1), stream, mask, 1)
        q = model.posterior(IMAGE[:1].double() / 255)
        z = terms.z
        mean = model.likelihood.mean(model.decode(z))
        x = IMAGE.double() / 255
        log_px = Normal(mean, 0.5).log_prob(x).flatten(1).sum(1)
        ratio = Normal(0.0, 1.0).log_prob(z).sum(1) - Normal(q.mu, q.log_sigma.exp()).log_prob(z).sum(1)
        torch.testing.assert_close(terms.log_weights[:, 0], log_px + ratio)
        plain = model(IMAGE.expand(50_000, -1, -1, -1), stream, mask)
    torch.testing.assert_close(terms.log_px, plain.log_px)
    elbo = (plain.log_px - plain.kl.sum(1)).mean()
    assert float(terms.log_weights.mean()) == pytest.approx(float(elbo), abs=0.02)


def test_it_grows_with_k_to_the_evidence(model: VAE) -> None:
    bounds = []
    for samples in (1, 3, 10, 1000):
        with torch.no_grad():
            bounds.append(-float(bound(model, {"samples": samples}, images=200_000 // samples)))
    assert bounds == sorted(bounds)
    assert bounds[1] - bounds[0] > 0.05, "or growing would mean little"
    assert bounds[-1] < evidence(model)
    assert bounds[-1] == pytest.approx(evidence(model), abs=0.01)


def test_the_weights_are_averaged_not_their_logarithms() -> None:
    log_weights = torch.tensor([[0.0, math.log(3.0)], [-1000.0, -1000.0]])
    torch.testing.assert_close(log_mean_exp(log_weights), torch.tensor([math.log(2.0), -1000.0]))


def gradient(model: VAE, kind: dict[str, object], *, images: int, step: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    bound(model, kind, images=images, step=step).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_both_gradients_are_the_same_on_average(model: VAE) -> None:
    """And the doubly reparameterized one of the encoder is less noisy (Tucker et al. 2019, figure 1)."""
    single, double = (
        [gradient(model, {"samples": 8, "gradient": kind}, images=2000, step=step) for step in range(20)]
        for kind in ("reparameterized", "doubly_reparameterized")
    )
    for name in single[0]:
        a, b = (torch.stack([one[name] for one in draws]) for draws in (single, double))
        error = 5 * ((a.var(0) + b.var(0)) / 20).sqrt() + 1e-9
        assert ((a.mean(0) - b.mean(0)).abs() < error).all(), name
        if name.startswith("network.encoder") or "log_sigma" in name:
            assert b.var(0).sum() < 0.5 * a.var(0).sum(), name
        else:
            torch.testing.assert_close(a, b)


def test_with_the_exact_posterior_the_doubly_reparameterized_gradient_of_the_encoder_vanishes() -> None:
    """Then all weights are p(x), whatever z: d log w / d z = 0, and no draw has any noise."""
    torch.manual_seed(2)
    likelihood = GaussianConfig(sigma=0.5, mean="identity")
    model = build_vae(
        LinearConfig(latent_dim=1), DiagonalConfig(), likelihood, image_size=2, channels=1
    ).double()
    network = model.network
    with torch.no_grad():
        w, b = network.decoder.weight[:, 0], network.decoder.bias
        precision = 1 + w.square().sum() / 0.25
        network.encoder.weight.copy_((w / 0.25 / precision)[None])
        network.encoder.bias.copy_((-(w * b).sum() / 0.25 / precision)[None])
        log_sigma = -0.5 * precision.log()
        network.log_sigma.copy_(8 * torch.atanh(log_sigma / 8)[None])
    found = gradient(model, {"samples": 4, "gradient": "doubly_reparameterized"}, images=5)
    for name, value in found.items():
        if "encoder" in name or "log_sigma" in name:
            assert value.abs().max() < 1e-6, name
        else:
            assert value.abs().max() > 1e-3, name
    noisy = gradient(model, {"samples": 4}, images=5)
    assert noisy["network.log_sigma"].abs().max() > 1e-3


def test_a_latent_map_has_weights_too() -> None:
    torch.manual_seed(0)
    config = ConvConfig(latent_dim=3, widths=(8,))
    model = build_vae(config, DiagonalConfig(), GaussianConfig(sigma=0.3), image_size=4, channels=1)
    images = torch.randint(
        0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    stream, mask = noise.Stream(0, 0, torch.arange(5)), torch.ones(5, dtype=torch.bool)
    few, many = (model(images, stream, mask, samples).log_weights for samples in (2, 6))
    torch.testing.assert_close(few, many[:, :2], rtol=1e-5, atol=1e-4)
