"""The importance-weighted bound of a data set against the exact log-likelihood of a linear model."""

import numpy as np
import pytest
import torch

from vaescale import noise
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import open_reader
from vaescale.errors import UserError
from vaescale.evaluation.importance import ImportanceBound
from vaescale.evaluation.likelihood import evaluate
from vaescale.evaluation.measures import measure
from vaescale.recipe import Recipe
from vaescale.trained import build_model


def recipe(content, **likelihood) -> Recipe:
    return Recipe.model_validate(
        content
        | {"network": {"kind": "linear", "latent_dim": 2}}
        | {"likelihood": {"kind": "gaussian", "mean": "identity", "sigma": 0.4, **likelihood}}
    )


def bounds(own: Recipe, samples: int, *, images: int | None = None, batch: int = 100):
    model, reader = build_model(own).eval(), open_reader(own.data.val, own.data)
    batches = evaluation_batches(reader, batch=batch, rank=0, world_size=1)
    return measure(model, batches, [ImportanceBound(model, samples=samples, most_images=images)], seed=0)


def test_it_falls_to_the_exact_value(recipe_content) -> None:
    own = recipe(recipe_content)
    model, reader = build_model(own).eval(), open_reader(own.data.val, own.data)
    weight, bias = model.network.decoder.weight.double(), model.network.decoder.bias.double()
    covariance = weight @ weight.T + 0.16 * torch.eye(64)
    x = torch.stack([reader[number].images[0] for number in range(100)]).flatten(1).double() / 255
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x).mean()
    found = [bounds(own, samples, images=100) for samples in (1, 10, 100, 3000)]
    values = [one["neg_iwae_nats"] for one in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(-float(exact.detach()), abs=0.01)
    assert all(one["importance_images"] == 100 for one in found)


def test_one_sample_is_the_elbo_of_the_same_draws(recipe_content) -> None:
    """Averaged over images, the sampled KL is near the analytic one."""
    own = recipe(recipe_content)
    model, reader = build_model(own).eval(), open_reader(own.data.val, own.data)
    batches = evaluation_batches(reader, batch=100, rank=0, world_size=1)
    elbo = evaluate(model, batches, seed=0)["neg_elbo_nats"]
    one = bounds(own, 1)
    assert one["importance_images"] == 360
    assert one["neg_iwae_nats"] == pytest.approx(elbo, abs=0.2)
    assert one["importance_neg_elbo_nats"] == one["neg_iwae_nats"]
    many = bounds(own, 50)
    assert many["importance_neg_elbo_nats"] == pytest.approx(elbo, abs=0.1)
    assert many["neg_iwae_nats"] < many["importance_neg_elbo_nats"]


def test_batches_and_chunks_do_not_matter(recipe_content) -> None:
    own = recipe(recipe_content)
    expected = bounds(own, 30, batch=360)["neg_iwae_nats"]
    for batch in (50, 7):
        assert bounds(own, 30, batch=batch)["neg_iwae_nats"] == pytest.approx(expected, rel=1e-6)


def test_more_draws_contain_the_fewer_ones(recipe_content) -> None:
    """From 4 and 5 draws the fifth's own weight is known, and it is draw 0 of the stream's step 1."""
    own = recipe(recipe_content)
    four, five = (bounds(own, samples, images=1)["neg_iwae_nats"] for samples in (4, 5))
    model, reader = build_model(own).eval(), open_reader(own.data.val, own.data)
    x = model.target(reader[0].images, noise.Stream(0, 0, torch.zeros(1, dtype=torch.int64)))
    with torch.no_grad():
        stream = noise.Stream(0, 1, torch.zeros(1, dtype=torch.int64))
        inferred = model.infer(model.encode(x), stream, 1, False)
        fifth = float(model.terms(x, inferred, torch.ones(1, dtype=torch.bool)).log_weights)
    joined = np.logaddexp(-four + np.log(4), fifth) - np.log(5)
    assert -five == pytest.approx(joined, abs=1e-4)


def test_a_sigma_fitted_to_each_image_bounds_nothing(recipe_content) -> None:
    with pytest.raises(UserError, match="no bound of log p"):
        bounds(recipe(recipe_content, sigma="optimal_per_image"), 2)
