"""A sigma that has not arrived: the images' own one, the nats between them, and a fit to the training images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import on_ranks
from vaescale import noise
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import open_reader
from vaescale.errors import UserError
from vaescale.evaluation.likelihood import evaluate
from vaescale.evaluation.refit import can_refit, refit_sigma, refuse_refit
from vaescale.recipe import Recipe
from vaescale.runs.folder import read_json
from vaescale.trained import build_model, in_order, open_split, open_trained

SIGMAS = {
    "optimal": (0, 1, 2, 3),
    "optimal_per_channel": (0, 2, 3),
    "optimal_per_pixel": (0,),
}


def own_errors(model, reader) -> np.ndarray:
    """x - mean of one draw for each image, float64 [N, C, H, W]."""
    x = torch.cat([reader[number].images for number in range(len(reader))]).float() / 255
    with torch.no_grad():
        drawn = model.infer(model.encode(x), noise.Stream(0, 0, torch.arange(len(x))), 1, False)
        return (x - model.likelihood.mean(drawn.params)).double().numpy()


def optimum(kind: str, error: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    """The maximum-likelihood sigma of each group in float64, after the definition."""
    if kind == "gaussian":
        return np.sqrt((error**2).mean(over))
    return np.sqrt(2) * np.abs(error).mean(over)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_sigma_and_nats_are_those_of_float64_and_of_an_evaluation(
    recipe_content, kind: str, sigma: str
) -> None:
    recipe = Recipe.model_validate({**recipe_content, "likelihood": {"kind": kind, "sigma": sigma}})
    model, reader = build_model(recipe).eval(), open_reader(recipe.data.val, recipe.data)
    best = optimum(kind, own_errors(model, reader), SIGMAS[sigma])

    def batches(size: int = 100):
        return evaluation_batches(reader, batch=size, rank=0, world_size=1)

    before = evaluate(model, batches(), seed=0)
    assert before["data_sigma"] == pytest.approx(np.sqrt((best**2).mean()), rel=1e-6)
    assert before["sigma_gap_nats"] > 1
    refitted = refit_sigma(model, batches(37), seed=0)  # with a last batch that has padding
    assert refitted.images == 360
    own = model.likelihood.state.evaluation_log_sigma(None).exp().flatten().numpy()
    np.testing.assert_allclose(own, best.flatten(), rtol=1e-6)
    after = evaluate(model, batches(), seed=0)
    assert refitted.gap_nats == pytest.approx(before["sigma_gap_nats"], rel=1e-6)
    assert before["neg_elbo_nats"] - after["neg_elbo_nats"] == pytest.approx(refitted.gap_nats, rel=1e-4)
    assert after["sigma_gap_nats"] == pytest.approx(0, abs=1e-6)
    assert after["sigma"] == pytest.approx(before["data_sigma"], rel=1e-9)


def _on_rank(rank: int, ranks: int, run: str) -> dict[str, torch.Tensor]:
    trained = open_trained(Path(run))
    fit = refit_sigma(trained.model, in_order(open_split(trained.recipe, "train")), seed=trained.recipe.seed)
    return {"after": torch.tensor(fit.after), "images": torch.tensor(fit.images)}


@pytest.mark.distributed
def test_two_ranks_fit_the_sigma_of_one(trained_run: Path, tmp_path: Path) -> None:
    trained = open_trained(trained_run)
    alone = refit_sigma(
        trained.model, in_order(open_split(trained.recipe, "train")), seed=trained.recipe.seed
    )
    for found in on_ranks(tmp_path / "ranks", _on_rank, str(trained_run)):
        assert float(found["after"]) == pytest.approx(alone.after, rel=1e-6)
        assert int(found["images"]) == alone.images == 1437


def test_evaluate_takes_the_sigma_of_the_training_images(vaescale, trained_run: Path, tmp_path: Path) -> None:
    """With the averaged weights, whose sigma the running average of the raw weights' errors is not."""
    run = tmp_path / "run"
    run.symlink_to(trained_run)
    plain = vaescale("evaluate", run, "--json")
    fitted = vaescale("evaluate", run, "--refit-sigma", "--json")
    train = vaescale("evaluate", run, "--split", "train", "--json").json
    assert fitted.code == 0, fitted.err
    found = fitted.json
    assert found["metrics"]["sigma"] == pytest.approx(train["metrics"]["data_sigma"], rel=1e-6)
    assert found["metrics"]["sigma"] != pytest.approx(plain.json["metrics"]["sigma"], rel=1e-3)
    assert found["protocol"]["sigma"].startswith("maximum-likelihood value of 1437 training images")
    assert found["sigma"]["before"] == plain.json["metrics"]["sigma"]
    assert "fitted to 1437 training images" in found["sigma"]["sentence"]
    assert read_json(trained_run / "evaluation" / "val-refit.json")["metrics"] == found["metrics"]
    of_plain = plain.json["sigma"]
    assert of_plain["gap_nats"] == plain.json["metrics"]["sigma_gap_nats"]
    assert "nats an image between them" in of_plain["sentence"]
    assert of_plain["sentence"] in vaescale("evaluate", run).err


def test_training_ends_with_the_sigma_and_the_nats(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["likelihood"]["kind"] = "laplace"
    outcome = vaescale("train", recipe_file(recipe_content), "--json")
    found = outcome.json
    assert found["val"]["sigma_gap_nats"] > 0
    assert f"{found['val']['data_sigma']:.3g} fits the held-out errors best" in found["sigma"]
    assert found["sigma"] in outcome.err


@pytest.mark.parametrize(
    "likelihood",
    [{"sigma": 0.1}, {"sigma": "predicted"}, {"sigma": "optimal_per_image"}, {"kind": "categorical"}],
)
def test_without_a_running_sigma_there_is_nothing_to_fit(recipe_content, likelihood: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({**recipe_content, "likelihood": {"kind": "gaussian", **likelihood}})
    assert not can_refit(recipe.likelihood)
    with pytest.raises(UserError, match="--refit-sigma replaces a running sigma"):
        refuse_refit(recipe.likelihood)
