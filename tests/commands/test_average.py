"""Averages of several lengths in a run: opened by name, and put together after training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vaescale.trained import open_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    import yaml

    from tests.conftest import run_verb, tiny_recipe

    folder = tmp_path_factory.mktemp("averaged")
    content = tiny_recipe(digits, folder / "run")
    content["training"] |= {"steps": 24, "keep_every": 2, "checkpoint_every": 2, "evaluate_every": 24}
    content["training"] |= {"ema_more": [0.5, 0.8], "ema_sigma_rel": [0.05, 0.1, 0.2]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert run_verb("train", folder / "recipe.yaml") == 0
    return folder / "run"


def test_an_average_is_opened_by_its_name(vaescale, run: Path) -> None:
    outcome = vaescale("evaluate", run, "--weights", "ema-0.5", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["weights"] == "ema-0.5"
    assert (run / "evaluation" / "val-ema-0.5.json").is_file()
    refused = vaescale("evaluate", run, "--weights", "ema-0.7")
    assert refused.code == 2
    assert (
        "choose from ema, ema-0.5, ema-0.8, ema-sigma-0.05, ema-sigma-0.1, ema-sigma-0.2, raw" in refused.err
    )


@pytest.mark.parametrize(
    ("option", "value", "name"), [("--decay", "0.8", "ema-0.8"), ("--sigma-rel", "0.1", "ema-sigma-0.1")]
)
def test_a_saved_length_is_found_again(
    vaescale, run: Path, tmp_path: Path, option: str, value: str, name: str
) -> None:
    outcome = vaescale("average", run, tmp_path / "new" / "out", option, value, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["profile_error"] < 1e-6
    own = open_trained(tmp_path / "new" / "out")
    assert own.weights == name
    saved = load_file(run / "checkpoints/step-000000024" / f"{name}.safetensors")
    for key, weight in own.model.state_dict().items():
        torch.testing.assert_close(weight, saved[key], rtol=1e-5, atol=1e-6)


def test_another_length_is_a_run_that_can_be_used(vaescale, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = vaescale("average", run, out, "--sigma-rel", "0.15")
    assert outcome.code == 0, outcome.err
    assert "ema-sigma-0.15 at step 24" in outcome.out
    assert "error of the profile" in outcome.err
    assert vaescale("evaluate", out).code == 0
    again = vaescale("average", run, out, "--sigma-rel", "0.15")
    assert again.code == 2
    assert "already exists" in again.err


def test_a_run_without_saved_averages_is_refused(
    vaescale, trained_run: Path, run: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    assert vaescale("export", run, exported, "--weights", "ema-0.5").code == 0
    refused = vaescale("average", exported / "data/run", tmp_path / "out", "--decay", "0.9")
    assert refused.code == 2
    assert "train with training.ema_sigma_rel" in refused.err
