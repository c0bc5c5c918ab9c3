"""The evaluation against a brute-force loop over images; padding and batch size must not matter."""

import math

import pytest
import torch
from scipy import stats

from vaescale import noise
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import open_reader
from vaescale.evaluation.likelihood import bits_per_dim, evaluate
from vaescale.recipe import Recipe
from vaescale.trained import build_model


@pytest.fixture
def recipe(recipe_content) -> Recipe:
    return Recipe.model_validate(recipe_content | {"likelihood": {"kind": "gaussian", "sigma": 0.2}})


def test_it_agrees_with_one_image_at_a_time(recipe: Recipe) -> None:
    model, reader = build_model(recipe).eval(), open_reader(recipe.data.val, recipe.data)
    metrics = evaluate(model, evaluation_batches(reader, batch=100, rank=0, world_size=1), seed=7)
    log_px, kl, squares, mus = [], [], [], []
    with torch.no_grad():
        for number in range(len(reader)):
            image = reader[number].images[0]
            slot = torch.tensor([number])
            terms = model(image[None], noise.Stream(7, 0, slot), torch.ones(1, dtype=torch.bool))
            log_px.append(float(terms.log_px))
            kl.append(float(terms.kl))
            squares.append(float(terms.squared_error))
            mus.append(terms.mu[0].double())
    count = len(reader)
    assert metrics["images"] == count
    assert metrics["neg_elbo_nats"] == pytest.approx((sum(kl) - sum(log_px)) / count, rel=1e-6)
    assert metrics["kl_nats"] == pytest.approx(sum(kl) / count, rel=1e-6)
    assert metrics["mse"] == pytest.approx(sum(squares) / count / 64, rel=1e-6)
    variances = torch.stack(mus).var(0, correction=0)
    assert metrics["active_units"] == float((variances > 0.01).sum())
    assert metrics["sigma"] == 0.2


def test_an_active_unit_is_counted(recipe: Recipe) -> None:
    model = build_model(recipe)
    reader = open_reader(recipe.data.val, recipe.data)
    last = model.network.encoder[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.weight[1] = 1.0  # the second latent's mean follows the image, the others are constant
    metrics = evaluate(model, evaluation_batches(reader, batch=50, rank=0, world_size=1), seed=0)
    assert metrics["active_units"] == 1


@pytest.mark.parametrize("batch", [7, 360, 1000])
def test_batch_size_and_padding_do_not_matter(recipe: Recipe, batch: int) -> None:
    model, reader = build_model(recipe), open_reader(recipe.data.val, recipe.data)
    expected = evaluate(model, evaluation_batches(reader, batch=90, rank=0, world_size=1), seed=0)
    assert evaluate(
        model, evaluation_batches(reader, batch=batch, rank=0, world_size=1), seed=0
    ) == pytest.approx(expected, rel=1e-5)


def test_it_leaves_the_model_as_it_was(recipe_content) -> None:
    recipe = Recipe.model_validate(recipe_content)
    model, reader = build_model(recipe).train(), open_reader(recipe.data.val, recipe.data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, evaluation_batches(reader, batch=100, rank=0, world_size=1), seed=0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_per_dim_is_the_discrete_code_length() -> None:
    """A narrow-bin check: a density's nats in bits + 8 is the mean code length of its 256 cells."""
    density = stats.truncnorm(-2.5, 2.5, loc=0.5, scale=0.2)
    edges = torch.linspace(0, 1, 257).numpy()
    masses = density.cdf(edges[1:]) - density.cdf(edges[:-1])
    bits = -(masses * [math.log2(mass) for mass in masses]).sum()
    assert bits_per_dim(float(density.entropy()), 1) == pytest.approx(bits, abs=1e-3)
    assert bits_per_dim(0.0, 64) == 8
    assert bits_per_dim(64 * math.log(2), 64) == 9
