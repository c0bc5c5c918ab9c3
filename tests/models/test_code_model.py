"""A model of codes gives the trainer the nats of codes, and refuses what codes do not have."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.errors import UserError
from vaescale.evaluation.likelihood import column_sums, metric_names, model_metrics
from vaescale.likelihoods.config import CategoricalConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.vae import VAE
from vaescale.networks.config import NETWORKS
from vaescale.recipe import Recipe
from vaescale.training.memory import estimate
from vaescale.training.utilization import flops_of_an_image

CODES = 5
EVERY = torch.ones(6, dtype=torch.bool)
SECTION = {"kind": "code_transformer", "width": 8, "layers": 2, "heads": 2, "dropout": 0.3}


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    model = build_vae(
        OneOf(NETWORKS).validate(SECTION),
        DiagonalConfig(),
        CategoricalConfig(),
        image_size=(2, 3),
        channels=CODES,
        of_latents=True,
    )
    with torch.no_grad():  # away from uniform codes
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def codes() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CODES, (6, 1, 2, 3), generator=generator, dtype=torch.int32)


def stream() -> noise.Stream:
    return noise.Stream(0, 0, torch.arange(6))


def test_its_terms_are_nats_and_the_squared_error_of_one_hot_codes(model: VAE) -> None:
    model.eval()
    terms = model(codes(), stream(), EVERY)
    flat = codes().flatten(1).long()
    logits = model.network(flat[:, :-1]).detach()
    share = torch.softmax(logits, dim=2)
    expected = torch.log(share).gather(2, flat[..., None]).sum((1, 2))
    torch.testing.assert_close(terms.log_px.detach(), expected)
    onehot = torch.nn.functional.one_hot(flat, CODES)
    torch.testing.assert_close(terms.squared_error, (onehot - share).square().sum((1, 2)))
    metrics = model_metrics(model, column_sums(terms, EVERY)[:-1] / 6)
    assert metrics["neg_elbo_nats"] == pytest.approx(-float(expected.mean()), rel=1e-6)
    assert metrics["bits_per_dim"] == pytest.approx(metrics["neg_elbo_nats"] / (6 * math.log(2)))
    assert set(metrics) == {"neg_elbo_nats", "log_px_nats", "kl_nats", "mse", "bits_per_dim"}
    assert set(metrics) <= set(metric_names(model))


def test_training_has_dropout_of_the_slot_and_a_gradient_everywhere(model: VAE) -> None:
    model.train()
    terms = model(codes(), stream(), EVERY, 0, False, torch.bfloat16, False)
    assert terms.log_px.dtype == torch.float32
    assert terms.squared_error.shape == (6, 0)
    part = model(codes()[2:4], noise.Stream(0, 0, torch.arange(2, 4)), EVERY[2:4], 0, False, torch.bfloat16)
    torch.testing.assert_close(part.log_px, terms.log_px[2:4], rtol=0.02, atol=0.05)
    assert not torch.allclose(model.eval()(codes(), stream(), EVERY).log_px, terms.log_px, rtol=0.02)
    (-terms.log_px.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_memory_and_operations_are_counted(model: VAE) -> None:
    # Two products of 2 (place x width) multiply-adds of the least layer, the head, forward and twice backward.
    assert flops_of_an_image(model) > 3 * 2 * 6 * 8 * CODES
    one, two = (
        estimate(model, images=images, averages=0, precision="fp32")["activations"] for images in (8, 16)
    )
    assert two - one > 8 * 4 * 6 * CODES, "the logits alone"


def test_what_codes_do_not_have_is_refused(model: VAE) -> None:
    with pytest.raises(UserError, match="no latents to draw"):
        model(codes(), stream(), EVERY, 3)
    with pytest.raises(UserError, match="has the bound alone"):
        build_vae(
            OneOf(NETWORKS).validate(SECTION),
            DiagonalConfig(),
            CategoricalConfig(),
            image_size=4,
            channels=3,
            spectral=True,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"holds": "images", "channels": 1}}, "needs codes of another run"),
        ({"network": {"kind": "linear", "latent_dim": 2}}, "needs a model of codes"),
        ({"likelihood": {"kind": "gaussian"}}, "needs a mass over any number of codes"),
        ({"data": {"flip": True}}, "leave it out with holds: codes"),
        ({"network": {**SECTION, "heads": 3}}, "must be a multiple of heads"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {
        "name": "prior",
        "run_dir": "runs/prior",
        "data": {
            "train": "a",
            "val": "b",
            "holds": "codes",
            "image_size": 4,
            "channels": 9,
            "global_batch": 8,
        },
        "network": SECTION,
        "likelihood": {"kind": "categorical"},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 3},
    }
    Recipe.model_validate(content)
    for section, values in change.items():
        content[section] = content[section] | values if section == "data" else values
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(content)
