"""Verbs as functions that Python calls: the dict that the command line prints, and metrics added from outside."""

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from vaescale.commands import fit_gmm as fitting
from vaescale.commands.average import average
from vaescale.commands.baselines import baselines
from vaescale.commands.chaos import chaos
from vaescale.commands.compare_runs import compare_runs
from vaescale.commands.compress import compress
from vaescale.commands.doctor import doctor
from vaescale.commands.encode import encode
from vaescale.commands.evaluate import evaluate
from vaescale.commands.export import export
from vaescale.commands.fit_gmm import fit_gmm
from vaescale.commands.fit_prior import fit_prior
from vaescale.commands.latents import latents
from vaescale.commands.make_shards import index_shards, make_shards
from vaescale.commands.quality import quality
from vaescale.commands.sample import sample
from vaescale.commands.score import score
from vaescale.commands.signature import Count, checked
from vaescale.commands.sweep import sweep
from vaescale.commands.sync import sync
from vaescale.commands.train import describe, train
from vaescale.commands.train_features import train_features
from vaescale.commands.verify_shards import verify_shards
from vaescale.errors import UserError
from vaescale.evaluation.reconstruction import METRICS, Metric
from vaescale.recipe import load_recipe
from vaescale.runs import results
from vaescale.system.files import exclusive
from vaescale.trained import open_split, open_trained


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


NOWHERE = Path("runs/none")
NAN, INF = math.nan, math.inf
NONSENSE: dict[Callable[..., Any], tuple[dict[str, Any], ...]] = {
    evaluate: (
        *({"split": "test"}, {"weights": "EMA"}, {"importance_samples": -1}, {"importance_samples": 10**8}),
        *({"importance_images": -5}, {"data": 3}),
    ),
    compress: ({"limit": 0}, {"chunk_images": 0}, {"latent_bits": 5}, {"weights": "EMA"}, {"resample": "x"}),
    encode: ({"splits": ("test",)}, {"splits": ()}, {"splits": "val"}, {"weights": "EMA"}),
    fit_gmm: (
        *({"components": value} for value in ((), (0,), (2, 2), 3, ("many",))),
        *({"covariance": "foo"}, {"select": "aic"}, {"start": "foo"}, {"restarts": 0}, {"restarts": 1.5}),
        *({"online": 0}, {"online_batch": 0}, {"max_iterations": 0}, {"groups": 0}, {"seed": -1}),
        *({"samples_per_image": value} for value in (-1, 1001)),
        *({name: value} for name in ("ridge", "tolerance") for value in (-1, 0, 1, NAN, INF)),
    ),
    sample: (
        *({"count": -1}, {"count": 0}, {"prior": 3}, {"components": 0}, {"seed": -1}, {"map_side": 1}),
        *({"temperature": value} for value in (NAN, INF, -1, 0, 11)),
        *({"refine": 0}, {"refine_weight": -1}, {"refine_rate": NAN}, {"interpolate": [(1, -2)]}),
        *({"interpolate": [(1, 2, 3)]}, {"interpolate": []}, {"decode": 3}),
    ),
    quality: (
        *({"temperature": -1}, {"temperature": NAN}, {"decode": ()}, {"decode": "mean"}, {"count": 0}),
        *({"weights": "EMA"}, {"seed": -1}, {"trust_features": "perhaps"}),
    ),
    score: (
        *({"limit": 0}, {"maps_images": 0}, {"complexity": "zip"}, {"resample": "nearest"}),
        *({"odd_class": "7"}, {"weights": "EMA"}, {"odd": 3}, {"maps_images": 101}),
    ),
    latents: (*({"gap_steps": -1}, {"draws": 1}, {"gaps": -1}, {"importance_samples": 0}, {"seed": -1}),),
    baselines: ({"labels": 0}, {"groups": 0}, {"images": 0}),
    average: ({"sigma_rel": 0.3}, {"sigma_rel": NAN}, {"decay": 1}, {"decay": 0}, {"out": 3}),
    export: ({"weights": "EMA"}, {"log": "perhaps"}),
    fit_prior: (
        *({"width": 0}, {"layers": 0}, {"heads": 1.5}, {"steps": 0}, {"batch": 0}, {"lr": 0}, {"lr": NAN}),
        *({"weight_decay": -1}, {"dropout": 1}, {"dropout": INF}, {"weights": "EMA"}, {"seed": -1}),
    ),
    train_features: ({"steps": 1}, {"width": 0}, {"seed": -1}, {"out": 3}),
    make_shards: (
        *({"size": 0}, {"resample": "nearest"}, {"channels": 17}, {"encoding": "gif"}, {"quality": 101}),
        *({"shard_samples": 0}, {"holdout": 1}, {"holdout": NAN}, {"jobs": 0}, {"jobs": 5000}),
    ),
    index_shards: ({"jobs": 0},),
    verify_shards: ({"jobs": 0}, {"deep": "very"}),
    chaos: ({"faults": -1}, {"processes": 0}, {"patience": 0}, {"patience": NAN}, {"seed": "x"}),
    sweep: ({"write": "pbs"}, {"overrides": "seed=0,1"}, {"dry_run": "perhaps"}),
    compare_runs: ({"runs": 3}, {"metrics": "val/mse"}),
    sync: ({"run": 3},),
    train: ({"processes": 0}, {"recipe": "digits.yaml"}),
    describe: ({"processes": 0}, {"recipe": {}}),
    doctor: ({"seconds": 0}, {"seconds": 601}, {"seconds": NAN}),
}
NEEDED = {
    "run": NOWHERE,
    "folder": NOWHERE,
    "out": NOWHERE,
    "train": "none",
    "source": "digits",
    "overrides": ["seed=0,1"],
    "features": "pixels",
}


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        pytest.param(function, argument, id=f"{function.__name__}-{argument}")
        for function, arguments in NONSENSE.items()
        for argument in arguments
    ],
)
def test_functions_refuse_arguments_that_the_command_line_refuses(
    function: Callable[..., Any], argument: dict[str, Any], recipe_file, recipe_content
) -> None:
    """Before they look at the run, which does not exist."""
    recipe = Path(recipe_file(recipe_content))
    needed = NEEDED | {"recipe": load_recipe(recipe) if function in (train, describe) else recipe}
    names = inspect.signature(function).parameters
    given = {name: value for name, value in needed.items() if name in names} | argument
    ((name, _),) = argument.items()
    with pytest.raises(UserError, match=rf"^{name} \(=.+\) (must (be|have) |is refused: )"):
        function(**given)
    assert not NOWHERE.exists()


def test_a_refusal_names_the_argument_the_value_and_what_is_allowed() -> None:
    for call, sentence in (
        (lambda: evaluate(NOWHERE, split="test"), "split (='test') must be 'train' or 'val'"),
        (lambda: fit_gmm(NOWHERE, components=[1, 0]), "components (=0) must be at least 1"),
        (lambda: fit_gmm(NOWHERE, components=()), "components (=()) must have 1 value at least"),
        (lambda: fit_gmm(NOWHERE, tolerance=NAN), "tolerance (=nan) must be a finite number"),
        (lambda: fit_gmm(NOWHERE, ridge=1), "ridge (=1) must be below 1"),
        (lambda: fit_gmm(NOWHERE, components=(2, 2)), "components (=(2, 2)) must be different numbers"),
        (lambda: evaluate(3), "run (=3) must be a path"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == sentence


def test_checked_functions_keep_their_signature_and_python_types() -> None:
    @checked
    def listed(run: Path, *, numbers: list[Count], share: float = 0.5) -> tuple[Any, ...]:
        """List the arguments."""
        return run, numbers, share

    assert list(inspect.signature(listed).parameters) == ["run", "numbers", "share"]
    assert listed.__doc__ == "List the arguments."
    assert listed("a/b", numbers=[np.int64(3), 4], share=np.float32(0.25)) == (Path("a/b"), [3, 4], 0.25)
    with pytest.raises(TypeError, match="numbers"):
        listed(Path("a"))
    with pytest.raises(TypeError, match="other"):
        listed(Path("a"), numbers=[1], other=2)


def test_an_error_of_the_work_itself_stays_as_it_is() -> None:
    @checked
    def invalid(number: Count) -> None:
        TypeAdapter(Count).validate_python(-number)

    with pytest.raises(ValidationError):
        invalid(1)


def test_splits_and_weights_are_refused_where_they_are_opened(recipe_file, recipe_content) -> None:
    with pytest.raises(UserError, match=r"weights \(='EMA'\) must be 'ema', 'raw' or"):
        open_trained(NOWHERE, weights="EMA")
    with pytest.raises(UserError, match=r"split \(='test'\) must be 'train' or 'val'"):
        open_split(load_recipe(Path(recipe_file(recipe_content))), "test")


def test_doctor_runs_without_pydantic() -> None:
    """It names what is missing."""
    code = "import sys; sys.modules['pydantic'] = None; from vaescale.commands.doctor import doctor; doctor()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
