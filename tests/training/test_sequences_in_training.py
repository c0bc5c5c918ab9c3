"""Runs of sequences: resumed bit by bit, evaluated by sequence and by frame, shown as strips and an animation, and refused by verbs of images."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.clips import write_clips
from tests.conftest import run_verb, tiny_recipe
from vaescale import figures
from vaescale.cli import VERBS
from vaescale.commands import futures
from vaescale.commands.evaluate import Images, _save
from vaescale.commands.futures import strips_of
from vaescale.data.batch import Request
from vaescale.errors import DataError
from vaescale.evaluation.features import open_extractor, open_video_extractor
from vaescale.evaluation.frechet import frechet_distance, moments_here
from vaescale.evaluation.futures import future
from vaescale.recipe import Recipe, load_recipe
from vaescale.runs.folder import read_metrics
from vaescale.trained import open_split, open_trained

CONTEXT, HORIZON, STEPS = 2, 3, 6
NETWORK = {"kind": "svg", "context": CONTEXT, "horizon": HORIZON, "latent_dim": 3, "features": 8, "hidden": 8}
# What no run is opened for, or a recipe, a data set or several runs.
OF_SEQUENCES = ("train", "launch", "sweep", "evaluate", "sample", "compare-runs", "average", "sync", "chaos")
WITHOUT_RUNS = (
    "doctor",
    "make-shards",
    "verify-shards",
    "new-recipe",
    "train-features",
    "import",
    "quickstart",
    "decompress",
)


def content(data: Path, run: Path) -> dict[str, Any]:
    recipe = tiny_recipe(data, run)
    recipe["data"] |= {"holds": "sequences", "frames": CONTEXT + HORIZON, "global_batch": 16}
    recipe["training"] |= {"steps": STEPS, "evaluate_every": 3, "checkpoint_every": 3}
    return recipe | {"network": {**NETWORK, "widths": [4, 8]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    recipe = content(write_clips(folder / "clips"), folder / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_verb("train", folder / "recipe.yaml") == 0
    return folder / "run"


def test_a_resumed_run_is_bit_equal(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / f"checkpoints/step-{STEPS:09d}")
    assert run_verb("train", run.parent / "recipe.yaml", f"run_dir={again}") == 0
    for kind in ("model", "ema", "optimizer"):
        whole, parts = (
            load_file(one / f"checkpoints/step-{STEPS:09d}/{kind}.safetensors") for one in (run, again)
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), kind


def test_it_is_evaluated_by_sequence_and_by_frame(run: Path, vaescale: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    evaluated = vaescale("evaluate", folder, "--futures", "3", "--importance-samples", "4", "--json")
    assert evaluated.code == 0, evaluated.err
    result = evaluated.json
    metrics, frames, futures = (result[name] for name in ("metrics", "frames", "futures"))
    predicted = CONTEXT + HORIZON - 1
    assert metrics["neg_elbo_nats"] == pytest.approx(read_metrics(run)[-1]["val/neg_elbo_nats"], rel=1e-5)
    assert metrics["neg_elbo_nats"] == pytest.approx(sum(row["neg_elbo_nats"] for row in frames), rel=1e-5)
    assert metrics["kl_nats"] == pytest.approx(sum(row["kl_nats"] for row in frames), rel=1e-4)
    assert metrics["mse"] == pytest.approx(sum(row["mse"] for row in frames) / predicted, rel=1e-5)
    assert metrics["images"] == 21
    assert [row["frame"] for row in frames] == [2, 3, 4, 5]
    horizon = sum(row["neg_elbo_nats"] for row in frames[CONTEXT - 1 :])
    assert metrics["horizon_neg_elbo_nats"] == pytest.approx(horizon)
    assert metrics["horizon_bits_per_dim"] == pytest.approx(horizon / (HORIZON * 64 * math.log(2)) + 8)
    assert "frames 2 to 5 given the first" in result["protocol"]["bound"]
    assert metrics["neg_iwae_nats"] < metrics["importance_neg_elbo_nats"]
    assert metrics["importance_images"] == 21
    assert "images are sequences" in result["protocol"]["neg_iwae_nats"]
    assert [row["frame"] for row in futures] == [1, 2, 3]
    for name in ("best_psnr_db", "mean_future_psnr_db", "futures_variance", "copied_psnr_db"):
        assert metrics[name] == pytest.approx(sum(row[name] for row in futures) / HORIZON)
    assert metrics["best_psnr_db"] > metrics["mean_future_psnr_db"]
    assert 0 < metrics["mean_future_psnr_db_standard_error"] < 10
    assert metrics["futures_variance"] > 0
    assert "evaluation/val/best_psnr_db" in result["more_is_better"]
    reader = open_split(load_recipe(folder / "recipe.yaml"), "val")
    x = reader.__getitems__(Request(np.arange(21), refill=False)).images.double() / 255
    error = (x[:, CONTEXT:] - x[:, CONTEXT - 1 : CONTEXT]).square().flatten(2).mean(2).clamp_min(1e-10)
    assert metrics["copied_psnr_db"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-5)
    refitted = vaescale("evaluate", folder, "--refit-sigma", "--images", "5", "--json").json
    assert "fitted to 64 training sequences" in refitted["sigma"]["sentence"]


class _Unusable:
    """A reader whose first samples cannot be used."""

    def __init__(self, reader: Any, number: int) -> None:
        self.reader, self.number = reader, number

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, request: Request) -> Any:
        fetched = self.reader.__getitems__(request)
        return fetched._replace(usable=torch.from_numpy(request.numbers >= self.number))


def test_pictures_are_of_the_first_sequences_that_can_be_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = open_trained(shutil.copytree(run, tmp_path / "run"), of_sequences=True)
    reader = open_split(trained.recipe, "val")
    some: Any = _Unusable(reader, 9)
    of_each, _ = strips_of(trained, some, count=4)
    truth = reader.__getitems__(Request(np.arange(9, 13), refill=False)).images.numpy() / 255
    np.testing.assert_allclose([rows[0][1] for rows in of_each], truth, atol=1e-6)
    none: Any = _Unusable(reader, 21)
    images = Images(none, "val", "val", "the held-out", 21)
    result = {"metrics": {"mse": 0.1}, "interval_coverage": {}}
    assert _save(trained, images, result)["figures"] == []
    assert "reconstructions.png is not drawn" in capsys.readouterr().err
    monkeypatch.setattr(futures, "open_split", lambda *_: none)
    with pytest.raises(DataError, match="can be used; `vaescale verify-shards"):
        futures.draw_futures(trained, number=2, seed=0)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(figures, "image_strips", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        _save(trained, images._replace(reader=reader), {**result, "metrics": {"mse": 0.2}})
    saved = json.loads((trained.folder / "evaluation/val.json").read_text())
    assert saved["metrics"] == {"mse": 0.2}, "before the picture"


@pytest.fixture(scope="module")
def features(run: Path) -> Path:
    """Of frames and of videos, of more clips than the run's."""
    data = write_clips(run.parent / "more", train=200, val=60)
    words = ("--out", run.parent / "clips-features", "--steps", "80", "--width", "8")
    assert run_verb("train-features", data / "train", *words) == 0
    return run.parent / "clips-features"


@torch.no_grad()
def distances(features: Path, x: torch.Tensor, references: torch.Tensor) -> list[float]:
    """By all features at once, of the frames after the context and of the sequences [N, T, C, H, W]."""
    how = {"image_shape": (1, 8, 8), "device": torch.device("cpu")}
    frames = open_extractor(str(features), **how)
    videos = open_video_extractor(str(features), frames=CONTEXT + HORIZON, **how)
    assert videos is not None
    pairs = [(frames.of(each[:, CONTEXT:].flatten(0, 1)), videos.of(each)) for each in (x, references)]
    return [frechet_distance(*map(moments_here, pair)) for pair in zip(*pairs, strict=True)]


def clips(folder: Path, split: str) -> torch.Tensor:
    recipe = Recipe.model_validate(content(folder, folder / "run"))
    reader = open_split(recipe, split)
    return reader.__getitems__(Request(np.arange(len(reader)), refill=False)).images.float() / 255


def test_features_of_videos_alone_see_the_order_of_frames(run: Path, features: Path) -> None:
    train, val = (clips(run.parent / "more", split) for split in ("train", "val"))
    of_frames, of_videos = distances(features, val, train)
    backwards = torch.cat([val[:, :CONTEXT], val[:, CONTEXT:].flip(1)], dim=1)
    again = distances(features, backwards, train)
    assert again[0] == pytest.approx(of_frames, rel=1e-4)
    assert again[1] > 3 * of_videos
    assert distances(features, val[:, [2, 0, 4, 1, 3]], train)[1] > 8 * of_videos


def test_the_distance_of_futures_is_that_of_all_their_features(
    run: Path, features: Path, vaescale: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    words = ("evaluate", folder, "--futures", "1", "--features", features, "--cache", tmp_path / "cache")
    judged = vaescale(*words, "--json")
    assert judged.code == 0, judged.err
    rows = {row["of"]: row for row in judged.json["frechet"]}
    assert {row["sequences"] for row in rows.values()} == {21}
    assert "64 training sequences" in judged.json["protocol"]["frechet_videos_means"]
    train, val = (clips(run.parent / "clips", split) for split in ("train", "val"))
    true = distances(features, val, train)
    assert [rows["true"]["frames"], rows["true"]["videos"]] == pytest.approx(true, rel=1e-4)
    copied = torch.cat([val[:, :CONTEXT], val[:, [CONTEXT - 1] * HORIZON]], dim=1)
    wanted = distances(features, copied, train)
    assert [rows["copied"]["frames"], rows["copied"]["videos"]] == pytest.approx(wanted, rel=1e-4)
    trained = open_trained(run, of_sequences=True)
    drawn = future(trained.model, val, torch.arange(21), seed=0, number=0)  # type: ignore[arg-type]
    wanted = distances(features, torch.cat([val[:, :CONTEXT], (255 * drawn).round() / 255], dim=1), train)
    assert [rows["means"]["frames"], rows["means"]["videos"]] == pytest.approx(wanted, rel=1e-3)
    assert rows["draws"]["frames"] != rows["means"]["frames"]
    again = vaescale(*words, "--json").json
    assert again["metrics"] == pytest.approx(judged.json["metrics"]), "the references come from the cache"


def test_features_that_do_not_fit_are_refused(run: Path, vaescale: Any, tmp_path: Path) -> None:
    data, out = run.parent / "clips/train", tmp_path / "short"
    assert (
        vaescale("train-features", data, "--out", out, "--frames", "3", "--steps", "2", "--width", "4").code
        == 0
    )
    cases = {
        "are of videos of 3 frames, these have 5": (run, "--futures", "1", "--features", out),
        "give --futures N": (run, "--features", out),
    }
    for message, words in cases.items():
        refused = vaescale("evaluate", *words)
        assert refused.code == 2, refused.err
        assert message in refused.err
    longer = vaescale("train-features", data, "--out", tmp_path / "long", "--frames", "6")
    assert longer.code == 3
    assert "6" in longer.err


def test_its_samples_are_strips_and_an_animation_of_every_frame(
    run: Path, vaescale: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    sampled = vaescale("sample", folder, "--count", "4", "--json")
    assert sampled.code == 0, sampled.err
    assert (sampled.json["futures"], sampled.json["context"]) == (4, CONTEXT)
    strip, clip, *_ = sampled.json["figures"]  # and an MP4 where PyAV is installed
    with Image.open(strip) as rows:
        assert rows.height > rows.width > 100, "five frames, five rows of each of four sequences"
    with Image.open(clip) as animated:
        assert animated.n_frames == CONTEXT + HORIZON, "equal frames are kept, too"
    assert len([*(run / "figures/progress").glob("*.png")]) == 2


def test_verbs_of_images_say_that_it_is_of_sequences(run: Path, vaescale: Any, tmp_path: Path) -> None:
    words = {
        "score": (run, run.parent / "clips/val"),
        "quality": (run, "--features", "pixels"),
        "compress": (run, run.parent / "clips/val", tmp_path / "file"),
        "export": (run, tmp_path / "out"),
    }
    for verb in sorted(set(VERBS) - {*OF_SEQUENCES, *WITHOUT_RUNS}):
        refused = vaescale(verb, *words.get(verb, (run,)))
        assert refused.code == 2, (verb, refused.err)
        assert "is a model of sequences, and this reads models of images" in refused.err, (verb, refused.err)
    for option in ("--per-class", "--code-length"):
        refused = vaescale("evaluate", run, option)
        assert refused.code == 2, option
        assert "needs a model of images, and" in refused.err, option
    for option in ("--prior=standard", "--temperature=0.5", "--decode=mean", "--map=4"):
        refused = vaescale("sample", run, option)
        assert refused.code == 2, option
        assert "does not apply to a model of sequences" in refused.err, option
    other = shutil.copytree(run, tmp_path / "other")
    compared = vaescale("compare-runs", run, other, "--out", tmp_path / "page.html")
    assert compared.code == 0, compared.err


def test_futures_are_of_sequences(trained_run: Path, vaescale: Any) -> None:
    refused = vaescale("evaluate", trained_run, "--futures", "2")
    assert refused.code == 2
    assert "--futures needs a model of sequences" in refused.err


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good = content(tmp_path, tmp_path / "run")
    assert Recipe.model_validate(good).data.frames == CONTEXT + HORIZON
    clip = {"optimizer": {**good["optimizer"], "clip_norm_per_dimension": 2}}
    assert Recipe.model_validate(good | clip).optimizer.clip_norm == 2 * (CONTEXT + HORIZON - 1) * 64
    conv = {"kind": "conv", "latent_dim": 4, "widths": [8]}
    cases: dict[str, dict[str, Any]] = {
        "set data.frames=5": {"data": {**good["data"], "frames": 6}},
        "set network.kind=svg": {"network": conv},
        "set data.holds=sequences": {"data": tiny_recipe(tmp_path, tmp_path)["data"]},
        "needs a single latent vector or map": {"objective": {"mmd": {"weight": 1.0}}},
        "choose diagonal or relative": {"posterior": {"kind": "isotropic"}},
        "set training.compile to false": {"training": {**good["training"], "compile": True}},
        "needs layers that take a condition": {"condition": {"kind": "class", "classes": 2}},
    }
    for message, change in cases.items():
        with pytest.raises(ValidationError, match=message):
            Recipe.model_validate(good | change)


def test_it_opens_as_it_was_trained(run: Path) -> None:
    trained = open_trained(run, of_sequences=True)
    assert trained.model.example_shape == (CONTEXT + HORIZON, 1, 8, 8)
    assert json.loads((run / "run.json").read_text()).get("latents_of") is None
