"""Verbs as functions that Python calls: the dict that the command line prints, and metrics added from outside."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from vaescale.commands import fit_gmm as fitting
from vaescale.commands.encode import encode
from vaescale.commands.evaluate import evaluate
from vaescale.commands.fit_gmm import fit_gmm
from vaescale.commands.latents import latents
from vaescale.commands.quality import quality
from vaescale.commands.train_features import train_features
from vaescale.errors import UserError
from vaescale.evaluation.reconstruction import METRICS, Metric
from vaescale.runs import results
from vaescale.system.files import exclusive


@pytest.fixture
def run(vaescale, recipe_file, recipe_content) -> Path:
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    return Path(recipe_content["run_dir"])


def last_row(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_functions_return_what_the_command_line_prints(vaescale, run: Path, tmp_path: Path) -> None:
    cases = (
        (evaluate(run), ("evaluate", run)),
        (encode(run, splits=("val",)), ("encode", run, "--split", "val")),
        (fit_gmm(run, components=(1, 3)), ("fit-gmm", run, "--components", "1,3")),
        (
            quality(run, features="pixels", count=50, cache=tmp_path),
            ("quality", run, "--features", "pixels", "--count", 50, "--cache", tmp_path),
        ),
    )
    for result, words in cases:
        outcome = vaescale(*words, "--json")
        assert outcome.code == 0, outcome.err
        printed = outcome.json
        if words[0] == "quality":
            assert (result.pop("references_from_cache"), printed.pop("references_from_cache")) == (
                False,
                True,
            )
        assert printed == json.loads(json.dumps(result)), words[0]


def test_results_say_which_metrics_are_better_when_larger(run: Path, tmp_path: Path) -> None:
    evaluated = evaluate(run)
    assert {"evaluation/val/psnr_db", "evaluation/val/log_px_nats"} < {*evaluated["more_is_better"]}
    assert "evaluation/val/neg_elbo_nats" in last_row(run).keys() - {*evaluated["more_is_better"]}
    assert {*evaluated["more_is_better"]} < last_row(run).keys()
    judged = quality(run, features="pixels", count=50, decode=("mean",), cache=tmp_path)
    assert "quality/pixels/prior-mean/coverage" in judged["more_is_better"]
    assert "quality/pixels/prior-mean/frechet" in last_row(run).keys() - {*judged["more_is_better"]}
    assert {*judged["more_is_better"]} < last_row(run).keys()
    saved = json.loads((run / "evaluation" / "val.json").read_text())
    assert saved["more_is_better"] == evaluated["more_is_better"]


def test_a_metric_from_outside_is_in_every_result(
    vaescale, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closeness(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        return 1 - (x - means).abs().flatten(1).mean(1)

    monkeypatch.setitem(
        METRICS, "closeness", Metric("1 - mean absolute error", closeness, more_is_better=True)
    )
    result = vaescale("evaluate", run, "--json").json
    assert 0 < result["metrics"]["closeness"] < 1
    assert result["protocol"]["closeness"] == "1 - mean absolute error"
    assert "evaluation/val/closeness" in result["more_is_better"]
    assert last_row(run)["evaluation/val/closeness"] == result["metrics"]["closeness"]


def test_arguments_that_contradict_each_other_are_refused(run: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --importance-samples"):
        evaluate(run, importance_images=5)
    with pytest.raises(UserError, match="both choose the images"):
        evaluate(run, split="val", data=str(digits / "val"))
    with pytest.raises(UserError, match=r"--gaps \(=1\) must be at least 2"):
        latents(run, gaps=1)
    with pytest.raises(UserError, match=r"--count \(=9\) must be from 10 to 50000"):
        quality(run, features="pixels", count=9)
    with pytest.raises(UserError, match=r"--width \(=3\) must be from 4 to 512"):
        train_features(str(digits / "train"), out=tmp_path / "features", width=3)


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("fit-gmm", "--restarts", 0), "--restarts: 0 must be at least 1"),
        (("fit-gmm", "--tolerance", 1), "--tolerance: 1 must be above 0 and below 1"),
        (("fit-gmm", "--ridge", 0), "--ridge: 0 must be above 0 and below 1"),
        (("fit-gmm", "--online", "two"), "--online: 'two' is not a whole number"),
        (("latents", "--gaps", -1), "--gaps: -1 must be at least 0"),
        (("baselines", "--images", 9), "--images: 9 must be at least 10"),
        (
            ("quality", "--features", "pixels", "--temperature", 11),
            "--temperature: 11 must be above 0 and at most 10",
        ),
        (("train-features", "--out", "out", "--steps", 1), "--steps: 1 must be at least 2"),
    ],
)
def test_values_out_of_bounds_are_refused(vaescale, words: tuple[object, ...], refusal: str) -> None:
    vaescale(words[0], "runs/none", *words[1:]).assert_refused(2, refusal)


def test_two_fits_of_one_run_save_one_after_the_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would delete the first one's candidates between its files."""
    monkeypatch.setattr(fitting, "WAIT_SECONDS", 0.0)
    with (
        exclusive(run / fitting.LOCK),
        pytest.raises(UserError, match=r"another fit of .* is saving .*; run the same command again"),
    ):
        fit_gmm(run, components=(1,))
    assert not (run / "gmm").exists()
    assert fit_gmm(run, components=(1,))["components"] == 1


def test_a_fit_waits_for_another_and_sends_to_mlflow_without_the_lock(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may take minutes to answer, and a second fit would lose its result."""
    held_while_sending: list[bool] = []

    def push(folder: Path, _: object) -> None:
        held_while_sending.append((folder / fitting.LOCK).exists())
        assert (folder / "gmm" / "selection.json").is_file()

    for module in (results, fitting):
        monkeypatch.setattr(module, "push", push, raising=False)
    monkeypatch.setattr(fitting, "ROUND_SECONDS", 0.1, raising=False)
    holder = ExitStack()
    holder.enter_context(exclusive(run / fitting.LOCK))
    messages: list[str] = []

    def say(message: str) -> None:
        messages.append(message)
        holder.close()

    monkeypatch.setattr(fitting, "say", say)
    assert fit_gmm(run, components=(1,))["components"] == 1
    assert held_while_sending == [False]
    assert [message.startswith("waiting for another fit") for message in messages] == [True]
