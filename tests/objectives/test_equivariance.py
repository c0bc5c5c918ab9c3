"""The equivariance term: against a reference written apart, and sigma kept clean of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.errors import UserError
from vaescale.likelihoods.config import GaussianConfig, LaplaceConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig, EquivarianceConfig
from vaescale.models.equivariance import Transformation, drawn
from vaescale.models.vae import VAE, Terms
from vaescale.networks.config import ConvConfig, ResnetConfig
from vaescale.objectives.config import ElboConfig
from vaescale.recipe import Recipe

CONFIG = EquivarianceConfig(weight=0.7, anisotropic=True)
IMAGES = torch.randint(0, 256, (8, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def model_with(config: EquivarianceConfig | None, likelihood: Any = None) -> VAE:
    torch.manual_seed(0)
    network = ResnetConfig(latent_dim=2, width=4, multipliers=(1, 2), blocks=1, attention=True)
    model = build_vae(
        network,
        DiagonalConfig(),
        likelihood or GaussianConfig(sigma="optimal"),
        image_size=16,
        channels=1,
        equivariance=config,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double()


def terms_of(model: VAE, step: int, slots: Tensor | None = None) -> Terms:
    slots = torch.arange(8) if slots is None else slots
    comm.at_step(step)
    terms: Terms = model(
        IMAGES[slots], noise.Stream(0, step, slots), torch.ones(len(slots), dtype=torch.bool)
    )
    return terms


def resized(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between the centres of cells, by the definition, in loops over rows and columns."""
    before, result = maps, maps
    for axis, size in ((2, height), (3, width)):
        length, rows = before.shape[axis], []
        for place in range(size):
            centre = max(0.0, (place + 0.5) * length / size - 0.5)
            low = int(centre)
            high, share = min(low + 1, length - 1), centre - low
            rows.append((1 - share) * before.take(low, axis) + share * before.take(high, axis))
        before = result = np.stack(rows, axis=axis)
    return result


def turned(maps: np.ndarray, quarters: int) -> np.ndarray:
    """Counter-clockwise quarter turns, one at a time: rows from the last column to the first."""
    for _ in range(quarters):
        maps = maps.swapaxes(2, 3)[:, :, ::-1]
    return maps


@pytest.mark.parametrize(
    "likelihood", [GaussianConfig(sigma="optimal"), LaplaceConfig(sigma=0.3)], ids=["optimal", "Laplace"]
)
def test_the_term_is_its_definition(likelihood) -> None:
    model = model_with(CONFIG, likelihood)
    shapes = set()
    for step in range(6):
        model.likelihood.state.take_sums()
        terms = terms_of(model, step)
        height, width, turns = drawn(CONFIG, (8, 8), noise.Stream(0, step, torch.arange(8)))
        z = terms.z.detach().view(8, 2, 8, 8)
        small_z = turned(resized(z.numpy(), height, width), turns).copy()
        x = turned(resized(IMAGES.double().numpy() / 255, 2 * height, 2 * width), turns)
        with torch.no_grad():
            mean = torch.sigmoid(model.network.decode(torch.from_numpy(small_z))).numpy()
            plain = torch.sigmoid(model.network.decode(z)).numpy()
        error = np.abs(x - mean).reshape(8, -1)
        if likelihood.kind == "laplace":
            scale = 0.3 / np.sqrt(2)
            expected = -(np.log(2 * scale) + error / scale).sum(1)
        else:
            sigma = np.sqrt(np.mean((IMAGES.double().numpy() / 255 - plain) ** 2))
            expected = -(np.log(sigma) + 0.5 * np.log(2 * np.pi) + error**2 / (2 * sigma**2)).sum(1)
        assert x[0].size < 256
        assert terms.transformed_log_px.detach().numpy() == pytest.approx(expected, rel=1e-9)
        shapes.add((height, width, turns))
    assert len(shapes) == 6


def test_transformations_are_in_the_range_and_all_are_drawn() -> None:
    slots = torch.arange(3)
    config = EquivarianceConfig(scales=(0.25, 1.0), turns=(0, 3))
    found = {drawn(config, (8, 8), noise.Stream(1, step, slots)) for step in range(400)}
    assert found == {Transformation(rows, rows, turns) for rows in range(2, 8) for turns in (0, 3)}
    config = EquivarianceConfig(scales=None, turns=(2,))
    assert drawn(config, (7, 7), noise.Stream(1, 0, slots)) == Transformation(7, 7, 2)
    with pytest.raises(UserError, match="gives a latent map of 7x7 no size"):
        EquivarianceConfig(scales=(0.26, 0.27)).sides(7, 7)


@pytest.mark.parametrize("source", ["batch", "running"])
def test_sigma_is_kept_clean_of_it(source) -> None:
    """The state collects the same sums with and without the term, and a shared sigma gets no gradient from it."""
    likelihood = GaussianConfig(sigma="optimal", sigma_source=source, horizon_steps=10)
    sums = []
    for config in (None, CONFIG):
        model = model_with(config, likelihood)
        terms_of(model, 3)
        sums.append(model.likelihood.state.take_sums())
    assert len(sums[0]) == len(sums[1]) == 1
    assert torch.equal(sums[0][0], sums[1][0])
    shared = model_with(CONFIG, GaussianConfig(sigma="shared"))
    terms_of(shared, 3).transformed_log_px.sum().backward()
    assert shared.likelihood.state.log_shared.grad is None
    assert shared.network.encoder[0].weight.grad.abs().sum() > 0


def test_without_weight_it_has_no_effect_and_evaluation_does_not_compute_it() -> None:
    plain = ElboConfig(), model_with(None)
    unweighted = ElboConfig(equivariance=EquivarianceConfig(weight=0.0))
    assert unweighted.transforms is None
    for config, model in (plain, (unweighted, model_with(unweighted.transforms))):
        loss, pieces = config.implement(model)(terms_of(model, 2), noise.Stream(0, 2, torch.arange(8)))
        assert pieces == {}
        assert (
            loss.item()
            == (
                ElboConfig().implement(plain[1])(terms_of(plain[1], 2), noise.Stream(0, 2, torch.arange(8)))[
                    0
                ]
            ).item()
        )
    weighted = ElboConfig(equivariance=CONFIG)
    model = model_with(weighted.transforms)
    terms = terms_of(model, 2)
    more, pieces = weighted.implement(model)(terms, noise.Stream(0, 2, torch.arange(8)))
    assert (more - loss).item() == pytest.approx(-0.7 * terms.transformed_log_px.mean().item(), rel=1e-6)
    assert pieces.keys() == {"equivariance"}
    assert terms_of(model.eval(), 2).transformed_log_px.shape == (8, 0)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "network",
            {"kind": "conv", "latent_dim": 4},
            "needs a single latent map, which the network section",
        ),
        ("network", {"kind": "ladder"}, "needs a single latent map"),
        ("likelihood", {"kind": "bernoulli"}, "needs a sigma for images of any size"),
        ("likelihood", {"kind": "gaussian", "sigma": "optimal_per_pixel"}, "needs a sigma for images"),
        (
            "training",
            {"steps": 12, "compile": True},
            "needs an uncompiled model, which the training section does",
        ),
        ("objective", {"equivariance": {"scales": [0.9, 0.5]}}, "first below last"),
        ("objective", {"equivariance": {"scales": None, "turns": [0]}}, "leave images as they are"),
    ],
)
def test_what_it_does_not_fit_is_refused(recipe_content, section, values, message) -> None:
    content = recipe_content | {
        "network": {"kind": "resnet", "latent_dim": 2, "width": 4, "multipliers": [1, 2]},
        "objective": {"equivariance": {}},
    }
    Recipe.model_validate(content)
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(content | {section: values})


def test_recipes_without_it_have_the_hash_that_they_had(recipe_content) -> None:
    assert "equivariance" not in Recipe.model_validate(recipe_content).identity()["objective"]
    assert ConvConfig(latent_dim=4).offers() < ResnetConfig(latent_dim=4).offers()


def test_maps_that_are_no_squares_keep_whole_numbers_of_columns() -> None:
    slots = torch.arange(4)
    config = EquivarianceConfig(scales=(0.2, 1.0), turns=(0, 1))
    found = {drawn(config, (4, 6), noise.Stream(1, step, slots)) for step in range(60)}
    assert found == {Transformation(2, 3, turns) for turns in (0, 1)}
    maps = torch.rand(1, 1, 4, 6)
    assert Transformation(2, 3, 1)(maps, 2).shape == (1, 1, 6, 4)
