"""Early stopping and the plateau schedule: the rule, and that a resumed run decides as one that never stopped."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vaescale.runs.folder import read_metrics
from vaescale.training.config import EarlyStoppingConfig, PlateauConfig
from vaescale.training.improvement import Improvement, Watched

NEVER_BETTER = {"min_delta": 1e6}  # only the first evaluation is an improvement


def fold(values: list[float], *, patience: int, least: float = 0.0) -> Improvement:
    state = Improvement()
    for step, value in enumerate(values):
        state = state.after(step, value, patience=patience, least=least)
    return state


@pytest.mark.parametrize(
    ("values", "patience", "ended"),
    [
        ([3, 2, 1], 1, 0),
        ([3, 3], 1, 1),
        ([3, 4, 4, 2, 4, 4], 3, 0),
        ([3, 4, 4, 4], 3, 1),
        ([3, 4, 4, 4, 4, 4, 4], 3, 2),
        ([3, math.nan, math.nan], 2, 1),
        ([math.nan, 3, 2], 2, 0),
    ],
)
def test_patience_counts_evaluations_without_a_new_best(
    values: list[float], patience: int, ended: int
) -> None:
    assert fold(values, patience=patience).ended == ended


def test_a_small_gain_is_none() -> None:
    assert fold([3, 2.95, 2.91], patience=2, least=0.1).ended == 1
    assert fold([3, 2.95, 2.89], patience=2, least=0.1).ended == 0


def test_the_state_goes_through_json_and_takes_an_evaluation_once() -> None:
    own = Watched(EarlyStoppingConfig(patience=2), PlateauConfig(patience=1, factor=0.1))
    name = "val/neg_elbo_nats"
    assert Improvement.from_json(json.loads(json.dumps(Improvement().to_json()))) == Improvement()
    for step, value in ((10, 1.0), (20, 0.1 + 0.2), (30, 0.4)):
        own.add(step, {name: value})
    own.add(30, {name: 0.4})
    assert not own.has_stalled
    assert own.lr_factor(0.0) == 0.1
    assert own.lr_factor(0.25) == 0.25, "the lowest rate"
    again = Watched(EarlyStoppingConfig(patience=2), PlateauConfig(patience=1, factor=0.1))
    row = {"step": 40, name: 0.5}
    again.resume(json.loads(json.dumps(own.state())), 40, [row])
    own.add(40, row)
    assert again.state() == own.state()
    assert again.has_stalled
    assert again.lr_factor(0.0) == pytest.approx(0.01)


def _schedule(content, **optimizer) -> None:
    content["training"] |= {"evaluate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    content["optimizer"] |= optimizer


def _cut(run: Path, to: Path, *, step: int, evaluated: bool) -> None:
    """A copy of a run as if it had been killed after the checkpoint of a step, before or after its evaluation."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    rows = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line
        for line in rows
        if (row := json.loads(line))["step"] < step
        or (row["step"] == step and (evaluated or "val/mse" not in row))
    ]
    (to / "metrics.jsonl").write_text("".join(kept))
    (to / "summary.json").unlink()


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_plateau_resumes_bit_equal(
    vaescale, recipe_file, recipe_content, tmp_path, evaluated: bool
) -> None:
    plateau = {"patience": 2, "factor": 0.5, **NEVER_BETTER}
    _schedule(recipe_content, schedule="plateau", plateau=plateau, final_fraction=0.3)
    whole = Path(recipe_content["run_dir"])
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert "step 6: 0.5 of optimizer.lr from now on, a plateau" in outcome.err
    rates = [row["train/lr"] for row in read_metrics(whole)]
    assert rates == pytest.approx([2e-3] * 6 + [1e-3] * 4 + [6e-4] * 2)
    recipe_content["run_dir"] = str(tmp_path / "cut")
    _cut(whole, tmp_path / "cut", step=6, evaluated=evaluated)
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    last = "checkpoints/step-000000012"
    for file in ("model", "optimizer", "ema"):
        one, other = (load_file(run / last / f"{file}.safetensors") for run in (whole, tmp_path / "cut"))
        assert all(torch.equal(one[name], other[name]) for name in one), file
    states = [json.loads((run / last / "state.json").read_text()) for run in (whole, tmp_path / "cut")]
    assert states[0]["plateau"] == states[1]["plateau"] == states[0]["plateau"] | {"ended": 2, "step": 10}


@pytest.mark.parametrize("evaluated", [True, False])
def test_early_stopping_ends_a_run_and_a_resumed_one_alike(
    vaescale, recipe_file, recipe_content, tmp_path, evaluated: bool
) -> None:
    _schedule(recipe_content)
    recipe_content["training"] |= {"early_stopping": {"patience": 2, **NEVER_BETTER}, "checkpoint_every": 4}
    whole, cut = Path(recipe_content["run_dir"]), tmp_path / "cut"
    outcome = vaescale("train", recipe_file(recipe_content), "--json")
    assert outcome.code == 0, outcome.err
    assert (
        "training ends at step 6 of 12: val/neg_elbo_nats has not improved for 2 evaluations" in outcome.err
    )
    assert outcome.json["step"] == outcome.json["train"]["step"] == 6
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "step-000000004",
        "step-000000006",
    ]
    again = vaescale("train", recipe_file(recipe_content), "--json")
    assert again.json["step"] == 6
    assert "to step 6 already, where training.early_stopping ended it" in again.err
    _cut(whole, cut, step=4, evaluated=evaluated)
    recipe_content["run_dir"] = str(cut)
    resumed = vaescale("train", recipe_file(recipe_content), "--json")
    assert resumed.json["step"] == 6
    assert resumed.json["val"] == outcome.json["val"]
    more = vaescale(
        "train",
        recipe_file(recipe_content),
        "training.early_stopping.patience=4",
        "--allow-changes",
        "--json",
    )
    assert more.code == 0, more.err
    assert more.json["step"] == 10, "evaluations 4, 6, 8 and 10 brought nothing"


def test_an_unknown_metric_is_refused(vaescale, recipe_file, recipe_content) -> None:
    for key in ("training.early_stopping={metric: val/loss}", "optimizer.plateau={metric: val/loss}"):
        words = (key, "optimizer.schedule=plateau") if "plateau" in key else (key,)
        vaescale("train", recipe_file(recipe_content), *words).assert_refused(
            2, "'val/loss'", "val/neg_elbo_nats"
        )
    vaescale("train", recipe_file(recipe_content), "optimizer.plateau={patience: 3}").assert_refused(
        2, "plateau belongs to `schedule: plateau`"
    )


def test_verbs_take_the_best_checkpoint_and_any_that_is_kept(
    vaescale, recipe_file, recipe_content, tmp_path
) -> None:
    recipe_content["training"] |= {
        "keep_best": "val/kl_nats",
        "keep_checkpoints": 1,
        "evaluate_every": 4,
        "checkpoint_every": 4,
    }
    run = Path(recipe_content["run_dir"])
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    values = {row["step"]: row["val/kl_nats"] for row in read_metrics(run) if "val/kl_nats" in row}
    best = min(values, key=values.__getitem__)
    assert best != 12, "the KL rises from 0"
    found = vaescale("evaluate", run, "--checkpoint", "best", "--json")
    assert found.json["step"] == best
    assert found.json["metrics"]["kl_nats"] == values[best]
    assert (run / "evaluation" / "val-best.json").is_file()
    assert vaescale("sample", run, "--checkpoint", "best", "--json").json["step"] == best
    assert vaescale("encode", run, "--checkpoint", best, "--json").json["step"] == best
    vaescale("evaluate", run, "--checkpoint", 5).assert_refused(
        2, "no sound checkpoint of step 5", f"{best}, 12"
    )


def test_the_first_images_can_be_evaluated_alone(vaescale, trained_run) -> None:
    words = ("--images", 70, "--importance-samples", 4)
    some = vaescale("evaluate", trained_run, *words, "--importance-images", 30)
    assert "the importance-sampled bound is of the first 30 of 70 images" in some.err
    found = json.loads((trained_run / "evaluation" / "val-first-70.json").read_text())
    assert found["metrics"]["images"] == 70
    assert found["measured"]["evaluation/val-first-70/"].startswith("the first 70 images")
    assert "importance-sampled bound is of" not in vaescale("evaluate", trained_run, *words).err
