"""What every network promises inside a model: shapes, a gradient in every parameter, bf16, torch.compile, a state that comes
back, no dependence on the batch's company, and the same gradients on one rank and two.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_ranks
from vaescale import comm, noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import POSTERIORS
from vaescale.models.vae import VAE, Terms
from vaescale.networks.config import NETWORKS

SMALL_LADDER = {"kind": "ladder", "latent_dim": 2, "width": 8}
# network, posterior, image size, channels
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "linear": ({"kind": "linear", "latent_dim": 3}, {}, 5, 1),
    "mlp": ({"kind": "mlp", "latent_dim": 3, "widths": [12, 8]}, {}, 5, 3),
    "conv": ({"kind": "conv", "latent_dim": 3, "widths": [8, 12]}, {}, 8, 1),
    "conv, wide and odd": ({"kind": "conv", "latent_dim": 3, "widths": [5]}, {}, 10, 3),
    "conv, no norm": ({"kind": "conv", "latent_dim": 3, "widths": [8], "norm": "none"}, {}, 8, 1),
    "conv, batch norm": ({"kind": "conv", "latent_dim": 3, "widths": [8], "norm": "batch"}, {}, 8, 1),
    "conv, isotropic": ({"kind": "conv", "latent_dim": 3, "widths": [8]}, {"kind": "isotropic"}, 8, 1),
    "conv, fixed": ({"kind": "conv", "latent_dim": 3, "widths": [8]}, {"kind": "fixed", "sigma": 0.5}, 8, 1),
    "conv, latent map": ({"kind": "conv", "latent_dim": 3, "widths": [8, 12], "latent_map": True}, {}, 8, 1),
    "sigma-VAE": ({"kind": "conv", "latent_dim": 3, "preset": "sigma_vae_svhn"}, {}, 8, 3),
    "WAE": ({"kind": "conv", "latent_dim": 3, "preset": "wae_celeba"}, {}, 16, 3),
    "InfoGAN": ({"kind": "conv", "latent_dim": 3, "preset": "infogan"}, {}, 8, 1),
    "resnet": (
        {"kind": "resnet", "latent_dim": 2, "width": 32, "multipliers": [1, 2], "blocks": 1},
        {},
        8,
        1,
    ),
    "resnet, attention": (
        {
            "kind": "resnet",
            "latent_dim": 2,
            "width": 32,
            "multipliers": [1, 1],
            "blocks": 1,
            "attention_at": [4],
        },
        {"kind": "isotropic"},
        8,
        3,
    ),
    "ladder": (SMALL_LADDER, {}, 8, 1),
    "ladder, relative": ({**SMALL_LADDER, "checkpointing": True}, {"kind": "relative"}, 8, 3),
    "ladder, widths": (
        {**SMALL_LADDER, "widths": {6: 4, 3: 12}, "encoder": "6,6d2,3x2,3d3,1", "decoder": "1,3m1,3x1,6m3"},
        {},
        6,
        1,
    ),
}
BATCH_NORM = ("conv, batch norm", "WAE", "InfoGAN")
cases = pytest.mark.parametrize("name", CASES)


def build(name: str, likelihood: dict[str, Any] | None = None) -> VAE:
    network, posterior, size, channels = CASES[name]
    torch.manual_seed(0)
    model = build_vae(
        OneOf(NETWORKS).validate(network),
        OneOf(POSTERIORS, default="diagonal").validate(posterior),
        OneOf(LIKELIHOODS).validate(likelihood or {"kind": "gaussian", "sigma": "optimal"}),
        image_size=(size, size),
        channels=channels,
    )
    with torch.no_grad():  # away from weights that start at zero and let no gradient through
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def images(model: VAE, count: int = 6) -> Tensor:
    shape = (count, *model.image_shape)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def forward(model: torch.nn.Module, x: Tensor, slots: Tensor | None = None, **keys: Any) -> Terms:
    slots = torch.arange(len(x)) if slots is None else slots
    terms: Terms = model(x, noise.Stream(0, 0, slots), torch.ones(len(x), dtype=torch.bool), **keys)
    return terms


def loss(terms: Terms) -> Tensor:
    return terms.kl.sum(1) - terms.log_px


def test_every_kind_has_a_case() -> None:
    of_images = {
        kind for kind, section in NETWORKS.items() if not (section.of_codes or section.of_sequences)
    }  # see tests/models/test_code_model.py and test_sequence_model.py
    assert {network["kind"] for network, *_ in CASES.values()} == of_images


@cases
def test_shapes(name: str) -> None:
    model = build(name)
    groups, latents = len(model.group_sizes), model.num_latents
    terms = forward(model, images(model), importance_samples=3)
    assert terms.log_px.shape == terms.squared_error.shape == terms.variance.shape == (6,)
    assert terms.kl.shape == (6, groups)
    assert terms.latent_kl.shape == terms.unit_mean.shape == terms.unit_square.shape == (6, latents)
    assert terms.log_weights.shape == (6, 3)
    torch.testing.assert_close(terms.latent_kl.sum(1), terms.kl.sum(1))
    stream = noise.Stream(0, 0, torch.arange(5))
    params = model.likelihood.num_params(model.image_shape[0])
    with torch.no_grad():
        assert model.from_prior(stream).shape == (5, params, *model.image_shape[1:])
        assert model.reconstruct(model.target(images(model), stream)).shape == (
            6,
            params,
            *model.image_shape[1:],
        )


@cases
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(name)
    loss(forward(model, images(model))).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@cases
def test_an_image_does_not_depend_on_its_company(name: str) -> None:
    model = build(name).eval()
    x, slots = images(model), torch.arange(6)
    with torch.no_grad():
        whole = loss(forward(model, x))
        torch.testing.assert_close(loss(forward(model, x[2:4], slots[2:4])), whole[2:4], rtol=1e-4, atol=1e-3)
        means = model.likelihood.mean(model.from_prior(noise.Stream(0, 0, slots)))
        few = model.likelihood.mean(model.from_prior(noise.Stream(0, 0, slots[3:])))
        torch.testing.assert_close(few, means[3:], rtol=1e-4, atol=1e-4)


@cases
def test_bf16_stays_close(name: str) -> None:
    model = build(name, {"kind": "bernoulli"}).eval()
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = forward(model, x)
    assert low.log_px.dtype == low.kl.dtype == low.latent_kl.dtype == torch.float32
    torch.testing.assert_close(loss(low), loss(forward(model, x)), rtol=0.05, atol=0.5)


@cases
def test_its_state_comes_back(name: str) -> None:
    model, other = build(name), build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    forward(model, images(model))  # moves buffers
    model.likelihood.end_step()
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    x = images(model)
    assert torch.equal(loss(forward(model, x)), loss(forward(other, x)))


# One of each structure: the others are compiled as these.
COMPILED = ("linear", "conv", "sigma-VAE", "WAE", "InfoGAN", "resnet, attention", "ladder, widths")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_gives_the_same(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, {"kind": "bernoulli"}).train(name not in BATCH_NORM)
    compiled = torch.compile(model, backend="aot_eager")
    x = images(model)
    torch.testing.assert_close(loss(forward(compiled, x)), loss(forward(model, x)), rtol=1e-4, atol=1e-3)
    loss(forward(compiled, x)).mean().backward()
    own = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss(forward(model, x)).mean().backward()
    for got, parameter in zip(own, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-3)


def everyone_s_gradients(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    return {name: gradients(name, rank, ranks) for name in CASES}


def gradients(name: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of the mean loss over 6 images, shared by the ranks; buffers too. float64."""
    model = build(name).double().train()
    share = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    comm.at_step(0)
    loss(forward(wrapped, images(model)[share], torch.arange(6)[share])).mean().backward()
    model.likelihood.end_step()
    named = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return named | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, everyone_s_gradients)
    for name in CASES:
        for key, value in gradients(name, 0, 1).items():
            for rank in (0, 1):
                error = (found[rank][name][key].double() - value.double()).norm()
                assert float(error) <= 1e-6 * float(value.double().norm()) + 1e-9, (name, key, error)
