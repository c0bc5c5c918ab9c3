"""Runs with codes: resumed bit by bit, averaged together with their codebook, and what each verb does with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import run_verb, tiny_recipe
from vaescale.commands.run import load
from vaescale.commands.served import Served
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
from vaescale.models.codebook import Codebook
from vaescale.recipe import load_recipe
from vaescale.runs.folder import read_metrics
from vaescale.training import loop
from vaescale.training.averages import MAIN, averages_of

CODES = {
    "quantized": {"kind": "quantized", "codes": 8, "decay": 0.5, "restart_every": 5, "start_step": 2},
    "gradient": {
        "kind": "quantized",
        "codes": 8,
        "codebook": "gradient",
        "gradient": "rotation",
        "restart_every": 5,
    },
    "finite_scalar": {"kind": "finite_scalar", "levels": [4, 3]},
}


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `NAME`, a run of twelve steps, and `seen.npy`, the codebook of `quantized` after each of its steps."""
    folder = tmp_path_factory.mktemp("codes")
    seen: list[np.ndarray] = []
    end_step = Codebook.end_step

    def recorded(state: Codebook, skipped: torch.Tensor) -> None:
        end_step(state, skipped)
        seen.append(state.vectors.detach().numpy().copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codebook, "end_step", recorded)
        for name, posterior in CODES.items():
            content = tiny_recipe(digits, folder / name) | {"posterior": posterior}
            content["network"] = {"kind": "conv", "latent_dim": 2, "widths": [8], "latent_map": True}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
            assert run_verb("train", folder / f"{name}.yaml") == 0
            if name == "quantized":
                np.save(folder / "seen.npy", np.stack(seen))
    return folder


def tensors(run: Path, name: str, step: int = 12) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:09d}/{name}.safetensors")


@pytest.mark.parametrize("name", CODES)
def test_a_resumed_run_is_bit_equal(runs: Path, tmp_path: Path, name: str) -> None:
    """From step 6 on, with codes that restart at step 7 or 11."""
    again = shutil.copytree(runs / name, tmp_path / "run")
    shutil.rmtree(again / "checkpoints/step-000000012")
    assert run_verb("train", runs / f"{name}.yaml", f"run_dir={again}") == 0
    for kind in ("model", "ema", "optimizer"):
        whole, parts = tensors(runs / name, kind), tensors(again, kind)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), kind


def test_the_codebook_is_averaged_as_the_weights_are(runs: Path) -> None:
    config = load_recipe(runs / "quantized.yaml").training
    factors = averages_of(config)[MAIN].profile(12)
    seen = np.concatenate([np.zeros((1, 8, 2)), np.load(runs / "seen.npy")])
    expected = np.tensordot(factors, seen, axes=1)
    np.testing.assert_allclose(
        tensors(runs / "quantized", "ema")["quantizer.vectors"], expected, rtol=1e-5, atol=1e-7
    )
    model = tensors(runs / "quantized", "model")["quantizer.vectors"]
    np.testing.assert_array_equal(model, seen[-1])
    assert not np.allclose(model, expected, rtol=1e-3)


@pytest.mark.parametrize("name", CODES)
def test_its_rows_say_how_the_codes_are_used(runs: Path, name: str) -> None:
    rows = read_metrics(runs / name)
    codes = 12 if name == "finite_scalar" else 8
    last = rows[-1]
    assert last["val/kl_nats"] == pytest.approx(16 * np.log(codes), rel=1e-6)
    assert last["val/neg_elbo_nats"] == pytest.approx(last["val/kl_nats"] - last["val/log_px_nats"], rel=1e-6)
    for row in rows:
        for part in {name.partition("/")[0] for name in row} & {"train", "val"}:
            assert 1 <= row[f"{part}/code_perplexity"] <= codes * row[f"{part}/code_usage"] * (1 + 1e-9)
            assert "val/active_units" not in row
    assert ("train/commitment_nats" in rows[0]) == (name != "finite_scalar")


@pytest.mark.parametrize("name", CODES)
def test_verbs_work_or_say_why_not(runs: Path, vaescale, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(runs / name, tmp_path / "run")
    evaluated = vaescale("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.err
    metrics, protocol = evaluated.json["metrics"], evaluated.json["protocol"]
    assert protocol["bound"].startswith("-log p(x|z) of the image's codes, plus the length")
    assert metrics["neg_elbo_nats"] == pytest.approx(read_metrics(run)[-1]["val/neg_elbo_nats"], rel=1e-6)
    sampled = vaescale("sample", run, "--count", "4", "--json")
    assert sampled.code == 0, sampled.err
    assert "mixture" not in sampled.err
    assert (
        vaescale(
            "score", run, load_recipe(run / "recipe.yaml").data.val, "--out", tmp_path / "scores.csv"
        ).code
        == 0
    )
    assert (
        vaescale(
            "compare-runs", run, runs / "quantized", runs / "gradient", "--out", tmp_path / "page.html"
        ).code
        == 0
    )
    exported = vaescale("export", run, tmp_path / "mlflow")
    assert exported.code == 0, exported.err
    answer = Served(tmp_path / "mlflow/data/run").predict(
        np.zeros((2, 1, 8, 8), np.uint8), {"mode": "encode"}
    )
    assert answer.shape == (2, 32)
    with pytest.raises(Exception, match="has no prior over codes; fit one with `vaescale fit-prior RUN`"):
        Served(tmp_path / "mlflow/data/run").predict(
            np.zeros((2, 1, 8, 8), np.uint8), {"mode": "sample", "prior": "autoregressive"}
        )
    for words, message in {
        ("fit-gmm", run): "fit-gmm needs a Gaussian q",
        ("latents", run): "latents needs a Gaussian q",
        ("encode", run, "--draws", "2"): "encode writes as int32 as they are",
        ("evaluate", run, "--importance-samples", "3"): "--importance-samples needs a Gaussian q",
        ("sample", run, "--interpolate", "1,2"): "--interpolate needs a Gaussian q",
        ("sample", run, "--temperature", "0.5"): "has no meaning for uniform codes",
        ("export", run, tmp_path / "out", "--format", "torch_export"): "this format needs a Gaussian q",
    }.items():
        refused = vaescale(*words)
        assert refused.code == 2, words
        assert message in refused.err
        assert "Traceback" not in refused.err


PRIOR = ("--width", "16", "--layers", "1", "--heads", "2", "--steps", "20", "--batch", "32")


def test_a_prior_over_codes_is_fitted_used_and_resumed(
    runs: Path, vaescale, tmp_path: Path, monkeypatch
) -> None:
    run = shutil.copytree(runs / "quantized", tmp_path / "run")
    fitted = vaescale("fit-prior", run, *PRIOR, "--json")
    assert fitted.code == 0, fitted.err
    nats = fitted.json["prior/val_code_nats"]
    assert nats < fitted.json["prior/uniform_code_nats"] == pytest.approx(16 * np.log(8))
    weights = (run / "prior/prior.safetensors").read_bytes()

    metrics = vaescale("evaluate", run, "--json").json["metrics"]
    assert metrics["autoregressive_kl_nats"] == pytest.approx(nats, rel=1e-5)
    bound = nats - metrics["log_px_nats"]
    assert metrics["autoregressive_neg_elbo_nats"] == pytest.approx(bound, rel=1e-5)
    assert metrics["autoregressive_bits_per_dim"] == pytest.approx(bound / (64 * np.log(2)) + 8, rel=1e-5)
    assert metrics["neg_elbo_nats"] == pytest.approx(metrics["kl_nats"] - metrics["log_px_nats"])
    sampled = vaescale("sample", run, "--count", "4", "--json")
    assert sampled.json["priors"] == ["uniform codes", "autoregressive prior"]
    out = tmp_path / "samples"
    words = ("--count", "4", "--decode", "mean", "--temperature", "0.5", "--shards", out)
    drawn = vaescale("sample", run, "--prior", "autoregressive", *words, "--json")
    assert drawn.code == 0, drawn.err
    judged = vaescale("quality", run, "--features", "pixels", "--cache", tmp_path / "cache", "--json")
    assert "autoregressive prior" in {row["of"] for row in judged.json["rows"]}
    assert (
        "autoregressive_kl_nats"
        not in vaescale("evaluate", run, "--weights", "raw", "--json").json["metrics"]
    )

    # An exported run brings the prior along, and draws what the run draws.
    assert vaescale("export", run, tmp_path / "mlflow").code == 0
    served = Served(tmp_path / "mlflow/data/run")
    params = {"mode": "sample", "prior": "autoregressive", "temperature": 0.5}
    answer = served.predict(np.zeros((4, 1, 8, 8), np.uint8), params)
    drawn = read_samples(out)
    np.testing.assert_allclose(answer, drawn, atol=0.5 / 255 + 1e-6)
    uniform = served.predict(np.zeros((4, 1, 8, 8), np.uint8), {"mode": "sample"})
    assert np.abs(answer - uniform).max() > 0.1

    # Rows of its training, as of any run.
    training = run / "prior" / f"{load_recipe(run / 'recipe.yaml').name}-prior"
    rows = read_metrics(training)
    assert min(row["val/neg_elbo_nats"] for row in rows) == pytest.approx(nats, rel=1e-6)
    assert rows[-1]["val/bits_per_dim"] == pytest.approx(rows[-1]["val/neg_elbo_nats"] / (16 * np.log(2)))
    assert {"train/lr", "train/neg_elbo_nats", "perf/images_per_second"} <= rows[0].keys()
    assert [len(rows), rows[-1]["step"]] == [20, 20]
    refused = vaescale("sample", run, "--prior", training)
    assert "give --prior autoregressive" in refused.err

    # Trained already, it is not trained again; with another option it is.
    (run / "prior/prior.safetensors").unlink()
    again = vaescale("fit-prior", run, *PRIOR, "--json")
    assert f"{training} is trained to step 20 already" in again.err
    assert "epoch" not in again.err
    assert (run / "prior/prior.safetensors").read_bytes() == weights

    # Ended in step 14, another fit of the same command continues from the checkpoint of step 13.
    set_learning_rate, steps = loop.set_learning_rate, []

    def ended(optimizer: torch.optim.Optimizer, lr: float) -> None:
        steps.append(lr)
        if len(steps) == 14:
            raise KeyboardInterrupt
        set_learning_rate(optimizer, lr)

    (run / "prior/checkpoints").mkdir()  # of an earlier version
    words = (*PRIOR, "--seed", "1", "--precision", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_learning_rate", ended)
        stopped = vaescale("fit-prior", run, *words)
    assert stopped.code != 0
    assert "is of a fit with other settings" in stopped.err
    assert not (run / "prior/checkpoints").exists()
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "prior" / training.name)
    continued, whole = (vaescale("fit-prior", one, *words) for one in (run, other))
    assert "-prior from step 1" in continued.err
    assert "-prior from step" not in whole.err
    assert (run / "prior/prior.safetensors").read_bytes() == (other / "prior/prior.safetensors").read_bytes()
    assert (run / "prior/prior.safetensors").read_bytes() != weights


def test_codes_are_encoded_and_decoded_and_mirrored(runs: Path, vaescale, tmp_path: Path) -> None:
    """A run that was trained with mirrored images has a prior over the codes of both."""
    run = shutil.copytree(runs / "finite_scalar", tmp_path / "run")
    encoded = vaescale("encode", run, "--split", "val", "--json")
    assert encoded.code == 0, encoded.err
    split = encoded.json["splits"]["val"]
    assert (split["codes"], split["code_shape"], split["samples"]) == (12, [4, 4], 360)
    opened = load(run)
    config = load_recipe(run / "recipe.yaml").data
    images = open_reader(config.val, config).__getitems__(Request(np.arange(5))).images
    codes = code_maps(run, "val", 5)
    np.testing.assert_array_equal(
        opened.decode(codes), opened.reconstruct(images.numpy()), err_msg="decoded as the encoder's own codes"
    )

    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("flip: false", "flip: true"))
    fitted = vaescale("fit-prior", run, *PRIOR, "--steps", "3", "--json")
    assert fitted.code == 0, fitted.err
    assert (fitted.json["images"], fitted.json["mirrored"]) == ([2 * 1437, 360], True)
    both = code_maps(run, "train-both", 6)
    train = open_reader(config.train, config).__getitems__(Request(np.arange(3))).images
    with torch.no_grad():
        for view, pixels in enumerate((train, train.flip(-1))):
            own = opened.trained.model.encode(pixels.float() / 255).codes  # type: ignore[union-attr]
            np.testing.assert_array_equal(both[view::2], own.numpy())


def read_samples(folder: Path) -> np.ndarray:
    """The images [N, C, H, W] in [0, 1] of a folder of shards."""
    keys = {"train": "-", "val": "-", "image_size": 8, "global_batch": 1}
    reader = open_reader(str(folder), DataConfig.model_validate(keys))
    return reader.__getitems__(Request(np.arange(len(reader)))).images.numpy() / 255


def code_maps(run: Path, split: str, count: int) -> np.ndarray:
    """The first codes [count, h, w] of a split."""
    keys = {"train": "-", "val": "-", "holds": "codes", "image_size": 4, "channels": 12, "global_batch": 1}
    reader = open_reader(str(run / "latents" / split), DataConfig.model_validate(keys))
    return reader.__getitems__(Request(np.arange(count))).images[:, 0].numpy()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--width", "10", "--heads", "4"), "--width (=10) must be a multiple of --heads (=4)"),
        (("--batch", "5000"), "--batch (=5000) exceeds the 1437 training images"),
    ],
)
def test_priors_that_cannot_be_are_refused(runs: Path, vaescale, tmp_path: Path, words, message: str) -> None:
    refused = vaescale("fit-prior", shutil.copytree(runs / "finite_scalar", tmp_path / "run"), *words)
    assert refused.code == 2
    assert message in refused.err


def test_a_gaussian_run_has_no_codes_to_fit_or_draw(trained_run: Path, vaescale) -> None:
    refused = vaescale("fit-prior", trained_run)
    assert refused.code == 2
    assert "fit-prior needs codes" in refused.err
    refused = vaescale("sample", trained_run, "--prior", "autoregressive")
    assert refused.code == 2
    assert "--prior autoregressive is over codes" in refused.err


def test_summary_of_training_names_what_comes_next(runs: Path) -> None:
    assert json.loads((runs / "quantized/summary.json").read_text())["val"]["code_usage"] > 0
