"""One file and one dict line add a likelihood, network, posterior, objective, source and metric to every verb."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.extensions.cauchy import CauchyConfig
from tests.extensions.perceptron import PerceptronConfig
from tests.extensions.ramps import ramps
from tests.extensions.scaled import ScaledConfig
from tests.extensions.sharpness import SHARPNESS
from tests.extensions.squared import SquaredConfig
from vaescale.commands.compare_runs import compare_runs
from vaescale.commands.evaluate import evaluate
from vaescale.commands.make_shards import make_shards
from vaescale.commands.train import train
from vaescale.data.making.sources import SOURCES, Kind
from vaescale.errors import UserError
from vaescale.evaluation.reconstruction import METRICS
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.config import POSTERIORS
from vaescale.networks.config import NETWORKS
from vaescale.objectives.config import OBJECTIVES
from vaescale.recipe import load_recipe


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dict lines."""
    monkeypatch.setitem(LIKELIHOODS, "cauchy", CauchyConfig)
    monkeypatch.setitem(NETWORKS, "perceptron", PerceptronConfig)
    monkeypatch.setitem(POSTERIORS, "scaled", ScaledConfig)
    monkeypatch.setitem(OBJECTIVES, "squared", SquaredConfig)
    monkeypatch.setitem(SOURCES, "ramps", Kind(ramps, "nothing"))
    monkeypatch.setitem(METRICS, "sharpness", SHARPNESS)


@pytest.fixture
def content(recipe_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of these kinds alone."""
    recipe_content["data"] |= {"train": str(tmp_path / "ramps/train"), "val": str(tmp_path / "ramps/val")}
    return recipe_content | {
        "name": "extended",
        "run_dir": str(tmp_path / "extended"),
        "network": {"kind": "perceptron", "latent_dim": 3, "hidden": 24},
        "posterior": {"kind": "scaled", "sigma": 0.5},
        "likelihood": {"kind": "cauchy", "initial_scale": 0.2},
        "objective": {"kind": "squared", "weight": 0.01},
    }


def write(content: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_each_kind_from_outside_trains_and_is_measured(
    extended: None, content: dict[str, Any], tmp_path: Path
) -> None:
    written = make_shards("ramps", tmp_path / "ramps")
    assert (written["train"]["samples"], written["val"]["classes"]) == (256, 2)
    runs = []
    for seed in (0, 1):
        own = content | {"seed": seed, "name": f"extended-{seed}", "run_dir": str(tmp_path / f"run-{seed}")}
        result = train(load_recipe(write(own, tmp_path / f"{seed}.yaml")))
        runs.append(Path(result["run_dir"]))
        assert result["train"]["weight"] == 0.01
        assert result["train"]["squared_kl"] > 0
    results = [evaluate(run) for run in runs]
    for result in results:
        assert result["metrics"]["sharpness"] > 0
        assert result["protocol"]["sharpness"] == SHARPNESS.protocol
        assert "evaluation/val/sharpness" in result["more_is_better"]
    compared = compare_runs(runs, sort="evaluation/val/sharpness", out=tmp_path / "comparison")
    best = max(results, key=lambda result: float(result["metrics"]["sharpness"]))
    assert compared["runs"][0]["place"] == best["run"]
    assert compared["warnings"] == [], "the section says that it is a density"


def test_recipes_know_the_keys_of_kinds_from_outside(
    extended: None, content: dict[str, Any], tmp_path: Path
) -> None:
    path = write(content, tmp_path / "recipe.yaml")
    assert load_recipe(path, ["likelihood.initial_scale=0.3"]).likelihood == CauchyConfig(initial_scale=0.3)
    refused = {
        "likelihood.initial_scal=1": "did you mean likelihood.initial_scale?",
        "likelihood.kind=cauchi": "did you mean cauchy?",
        "objective.weight=-1": "objective.weight is -1; input should be greater than or equal to 0",
        "network.kind=ladder": "posterior.kind (='scaled') needs a single latent vector or map",
    }
    for override, message in refused.items():
        with pytest.raises(UserError) as caught:
            load_recipe(path, [override])
        assert message in str(caught.value)


def test_without_the_dict_line_the_kind_is_unknown(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"network\.kind is 'perceptron'; known here: conv, resnet, ladder, linear, mlp"
    ):
        load_recipe(write(content, tmp_path / "recipe.yaml"))
