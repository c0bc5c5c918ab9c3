"""The verbs after training, as a person would call them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.launching import ROOT, finished
from vaescale.mixtures import files as mixture_files
from vaescale.trained import open_trained


def test_make_shards_writes_once(vaescale, tmp_path: Path) -> None:
    first = vaescale("make-shards", "digits", tmp_path / "digits", "--json")
    assert {split: part["samples"] for split, part in first.json.items()} == {"train": 1437, "val": 360}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    again = vaescale("make-shards", "digits", tmp_path / "digits", "--json")
    assert again.json == first.json
    assert "already exists" in again.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == times
    words = vaescale("make-shards", "digits", tmp_path / "digits")
    assert "1437 images 8x8x1 in 2 shards" in words.out


def test_make_shards_refuses_what_it_does_not_know(vaescale, tmp_path: Path) -> None:
    vaescale("make-shards", "celebahq", tmp_path).assert_refused(2, "'celebahq' is unknown", "digits")
    vaescale("make-shards", "digits", tmp_path, "--shard-samples", 0).assert_refused(
        2, "argument --shard-samples: 0 must be from 1 to"
    )


def test_evaluate_repeats_the_last_evaluation_of_training(vaescale, run: Path) -> None:
    outcome = vaescale("evaluate", run, "--json")
    assert outcome.code == 0, outcome.err
    during = json.loads((run / "summary.json").read_text())["val"]
    assert during.pop("step") == outcome.json["step"] == 12
    found = outcome.json["metrics"]
    assert {name: found[name] for name in during} == during
    assert json.loads((run / "evaluation" / "val.json").read_text())["metrics"] == found
    assert found["psnr_db"] > 0
    assert found["data_sigma"] == pytest.approx(found["mse"] ** 0.5, rel=1e-6)
    assert (
        0
        < found["interval_coverage/50"]
        < found["interval_coverage/90"]
        <= found["interval_coverage/99"]
        <= 1
    )
    assert "ssim" not in found, "8x8 images are smaller than its window"
    assert (run / "figures" / "calibration.png").is_file()
    assert "neg_elbo_nats / (D ln 2) + 8" in outcome.json["protocol"]["bits_per_dim"]
    assert (run / "figures" / "reconstructions.png").is_file()
    assert "neg_elbo_nats" in vaescale("evaluate", run).out


def test_evaluate_takes_a_split_and_weights(vaescale, run: Path) -> None:
    outcome = vaescale("evaluate", run, "--split", "train", "--weights", "raw", "--json")
    assert outcome.json["metrics"]["images"] == 1437
    assert outcome.json["weights"] == "raw"
    assert [path.name for path in (run / "evaluation").iterdir()] == ["train-raw.json"]
    assert (run / "figures" / "reconstructions-train-raw.png").is_file()


def test_fit_gmm_saves_a_mixture_of_the_latents(vaescale, run: Path) -> None:
    outcome = vaescale("fit-gmm", run, "--components", 3, "--samples-per-image", 2, "--json")
    assert outcome.code == 0, outcome.err
    mixture = mixture_files.load(run / "gmm")
    assert mixture.means.shape == (3, 4)
    assert float(mixture.weights.sum()) == pytest.approx(1)
    assert outcome.json["gmm/val_log_density_nats"] > outcome.json["gmm/val_prior_log_density_nats"]
    assert set(outcome.json["simpler_val_nats"]) == {"tied", "diag", "spherical"}
    assert outcome.json["notes"] == []
    assert json.loads((run / "summary.json").read_text())["gmm"]["components"] == 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12
    assert rows[-1]["gmm/val_log_density_nats"] == outcome.json["gmm/val_log_density_nats"]


def test_fit_gmm_refuses_what_cannot_be_fitted(vaescale, run: Path) -> None:
    vaescale("fit-gmm", run, "--components", 0).assert_refused(2, "--components", "'0'")
    vaescale("fit-gmm", run, "--components", 99999).assert_refused(2, "lower --components")
    few = vaescale("fit-gmm", run, "--components", 300, "--samples-per-image", 1, "--max-iterations", 30)
    few.assert_refused(2, "no more images than latents", "nothing is saved")
    assert not (run / "gmm").exists()
    vaescale("fit-gmm", run, "--seed", -1).assert_refused(2, "--seed: -1 must be at least 0")


def test_sample_draws_with_and_without_a_mixture(vaescale, run: Path) -> None:
    outcome = vaescale("sample", run, "--count", 4, "--json")
    assert outcome.json["priors"] == ["prior"]
    assert "vaescale fit-gmm" in outcome.err
    small = (run / "figures" / "samples.png").stat().st_size
    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    outcome = vaescale("sample", run, "--count", 4, "--json")
    assert outcome.json["priors"] == ["prior", "mixture"]
    assert (run / "figures" / "samples.png").stat().st_size > small
    (run / "gmm" / "mixture.safetensors").write_bytes(b"")
    vaescale("sample", run).assert_refused(2, "is damaged")
    vaescale("sample", run, "--count", 0).assert_refused(2, "argument --count: 0 must be at least 1")
    vaescale("sample", run, "--seed", -1).assert_refused(2, "argument --seed: -1 must be at least 0")
    words = ("sample", run, "--prior", "standard", "--json", "--decode", "offset:0.5", "--count")
    pages = vaescale(*words, 300).json
    assert (pages["count"], pages["decode"]) == (300, ["offset:0.5"])
    assert [Path(path).name for path in pages["figures"]] == ["samples.png", "samples-002.png"]
    assert all(Path(path).is_file() for path in pages["figures"])
    assert vaescale(*words, 4).code == 0
    assert not Path(pages["figures"][1]).exists(), "of an earlier call"


def test_several_numbers_of_components_are_compared(vaescale, run: Path) -> None:
    outcome = vaescale("fit-gmm", run, "--components", "1,2,4", "--covariance", "diag", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert [one["components"] for one in result["candidates"]] == [1, 2, 4]
    best = max(result["candidates"], key=lambda one: one["val_nats"])
    assert result["components"] == best["components"]
    assert (run / "figures" / "mixture_selection.png").is_file()
    chosen = mixture_files.load(run / "gmm")
    kept = mixture_files.load(run / f"gmm/components-{best['components']}")
    assert torch.equal(chosen.means, kept.means)
    assert chosen.kind == "diag"
    by_bic = vaescale("fit-gmm", run, "--components", "1,2,4", "--select", "bic", "--json").json
    assert by_bic["components"] == min(by_bic["candidates"], key=lambda one: one["bic"])["components"]
    again = vaescale("fit-gmm", run, "--components", 2)
    assert "mean log density" in again.out
    assert not list(run.glob("gmm/components-*")), "candidates of an earlier fit are gone"


def test_moments_and_online_fits(vaescale, run: Path) -> None:
    words = ("--components", 2, "--json")
    drawn, moments, online = (
        vaescale("fit-gmm", run, *words, *more).json
        for more in ((), ("--samples-per-image", 0), ("--online", 3, "--online-batch", 512))
    )
    assert moments["samples_per_image"] == 0
    assert abs(moments["val_nats"] - drawn["val_nats"]) < 0.2
    assert drawn["val_nats"] - 0.3 < online["val_nats"] < drawn["val_nats"] + 0.1
    assert online["online_passes"] == 3


def test_encode_writes_once_and_says_what_scales_the_latents(vaescale, run: Path) -> None:
    outcome = vaescale("encode", run, "--json")
    assert outcome.code == 0, outcome.err
    assert {split: part["samples"] for split, part in outcome.json["splits"].items()} == {
        "train": 1437,
        "val": 360,
    }
    assert len(outcome.json["splits"]["train"]["mean"]) == 4
    times = {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*")}
    assert "std by channel" in vaescale("encode", run).out
    assert {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*")} == times
    raw = vaescale("encode", run, "--split", "val", "--weights", "raw", "--json").json
    assert raw["splits"]["val"]["folder"].endswith("val-raw")


def test_what_reads_the_training_images_of_a_mixture_says_so(vaescale, run: Path) -> None:
    """A run of one set, opened as if it had two: 449 of 1,437 and 1,348 of 360 images are an epoch."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    sets = [
        {"path": recipe["data"][split], "weight": weight} for split, weight in (("train", 1.0), ("val", 3.0))
    ]
    recipe["data"] |= {"train": sets, "augment": {"shift": 1}, "balance": "class"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    encoded = vaescale("encode", run, "--split", "train", "--json")
    assert encoded.code == 0, encoded.err
    assert "the training images are an epoch of the mixture, 1797 images: " in encoded.err
    assert encoded.json["splits"]["train"]["samples"] == 1797
    evaluated = vaescale("evaluate", run, "--split", "train", "--json")
    assert evaluated.json["metrics"]["images"] == 1797
    assert evaluated.json["data"] == "train, an epoch of the mixture"
    assert "shifts of up to 1 pixels (edge)" in evaluated.json["protocol"]["training_images"]
    assert evaluated.json["data_hash"] != vaescale("evaluate", run, "--json").json["data_hash"]
    fitted = vaescale("fit-gmm", run, "--components", 2, "--json")
    assert fitted.code == 0, fitted.err
    assert "an epoch of the mixture, 1797 images" in fitted.err


def test_samples_are_written_as_a_data_set(vaescale, run: Path, tmp_path: Path) -> None:
    from vaescale.data.making.verifying import verify_shards

    words = ("sample", run, "--prior", "standard", "--decode", "mean", "--shards", tmp_path / "out")
    outcome = vaescale(*words, "--count", 1500, "--json")
    assert outcome.code == 0, outcome.err
    assert verify_shards(str(tmp_path / "out"), deep=True) == (1500, [])
    vaescale(*words).assert_refused(2, "is not empty")
    vaescale("sample", run, "--shards", tmp_path / "other").assert_refused(2, "give --prior and --decode")
    vaescale("sample", run, "--prior", "gmm").assert_refused(2, "no fitted mixture")


def test_lines_offsets_maps_and_refinement(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["network"]["latent_dim"] = 2
    recipe_content["likelihood"]["sigma"] = "predicted"
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    run = Path(recipe_content["run_dir"])
    assert vaescale("sample", run, "--interpolate", "3,17", "--interpolate", "5,9").code == 0
    assert vaescale("sample", run, "--map", 5).code == 0
    assert vaescale("sample", run, "--decode", "offset:-1", "--count", 4).code == 0
    refined = vaescale("sample", run, "--refine", 30, "--count", 8, "--json").json
    assert refined["mean_log_sigma_after"] < refined["mean_log_sigma_before"]
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {"interpolations.png", "latent_map.png", "samples.png", "refined.png"} <= figures
    vaescale("sample", run, "--interpolate", "3,360").assert_refused(2, "are 0 to 359")
    vaescale("sample", run, "--interpolate", "3").assert_refused(2, "pair of image numbers")
    vaescale("sample", run, "--map", 1).assert_refused(2, "argument --map: 1 must be from 2 to 64")
    vaescale("sample", run, "--refine", 0).assert_refused(2, "argument --refine: 0 must be from 1")
    vaescale("sample", run, "--components", 3).assert_refused(2, "no fitted mixture")
    vaescale("sample", run, "--map", 5, "--refine", 5).assert_refused(
        2, "--refine and --map exclude each other"
    )
    vaescale("sample", run, "--map", 5, "--count", 5).assert_refused(2, "--count does not apply with --map")
    vaescale("sample", run, "--refine", 5, "--decode", "mean").assert_refused(2, "--decode does not apply")
    vaescale("sample", run, "--refine", 5, "--count", 257).assert_refused(2, "at most 256")
    vaescale("sample", run, "--refine-rate", 5).assert_refused(2, "--refine-rate applies only to --refine")
    vaescale("sample", run, "--count", 25_601).assert_refused(2, "--shards OUT")
    vaescale("fit-gmm", run, "--components", "5,5").assert_refused(2, "such as 1,10,50")
    vaescale("fit-gmm", run, "--samples-per-image", 1001).assert_refused(2, "1001 must be from 0 to 1000")
    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    assert vaescale("sample", run, "--components", 2, "--count", 4).code == 0
    vaescale("sample", run, "--components", 3).assert_refused(2, "components 2, this is 3")
    assert vaescale("fit-gmm", run, "--components", "2,4").code == 0
    vaescale("sample", run, "--components", 3).assert_refused(2, "choose from 2, 4")
    assert "are replaced" in vaescale("fit-gmm", run, "--components", 2).err


def test_latents_are_measured(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["likelihood"]["sigma"] = "predicted"
    assert vaescale("train", recipe_file(recipe_content), "training.steps=40").code == 0
    run = Path(recipe_content["run_dir"])
    words = ("--gaps", 4, "--gap-steps", 5, "--importance-samples", 20)
    outcome = vaescale("latents", run, "--draws", 300, *words, "--json")
    assert outcome.code == 0, outcome.err
    known = outcome.json["information"]
    both = known["mutual_information"] + known["aggregate_kl"]
    error = known["mutual_information_error"] + known["aggregate_kl_error"]
    assert both == pytest.approx(known["mean_kl"], abs=4 * error + 0.01)
    assert outcome.json["information_mixture"].keys() == {"components", "covariance"}
    is_limited = known["own_share"] > 0.1
    assert (
        bool(outcome.json["limited"])
        == is_limited
        == any("own term" in note for note in outcome.json["notes"])
    )
    assert known["mutual_information_mixture"] + known["aggregate_kl_mixture"] == pytest.approx(
        known["mean_kl"]
    )
    assert known["mutual_information"] < known["mutual_information_leave_one_out"]
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["latents/own_share"] == known["own_share"]
    assert metrics["latents/aggregate_kl_mixture_nats"] == known["aggregate_kl_mixture"]
    assert outcome.json["gaps"]["images"] == 4
    gaps = outcome.json["gaps"]
    parts = (gaps["elbo_nats"], gaps["amortization_gap_nats"], gaps["approximation_gap_nats"])
    assert sum(parts) == pytest.approx(gaps["log_px_nats"])
    assert gaps["approximation_gap_nats"] > -0.5
    kinds = ["posterior", "prior", "prior x 3"]
    assert list(outcome.json["sigma"]["kinds"]) == kinds
    noise = outcome.json["noise"]
    assert list(noise) == ["images", "reconstructions", *kinds]
    assert all(row["ancestral"] > row["mean"] > 0 for name, row in noise.items() if name != "images")
    assert {"weights_hash", "code", "seed", "protocol"} <= outcome.json.keys()
    split = outcome.json["variance"]["pPCA, 4 latents"]
    assert split["latent"] + split["observed"] == pytest.approx(outcome.json["variance"]["data_total"])
    written = json.loads((run / "evaluation" / "latents.json").read_text())
    assert written["information"] == known
    figures = {path.name for path in (run / "figures").glob("latent_*.png")}
    assert figures == {"latent_use.png", "latent_variance.png", "latent_sigma.png", "latent_scatter.png"}
    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    words = vaescale("latents", run, "--draws", 300)
    assert "noise in pictures of" in words.out
    assert "leave-one-out" in words.out
    assert json.loads((run / "evaluation" / "latents.json").read_text())["gaps"] == gaps, "which took minutes"
    both = json.loads((run / "evaluation" / "latents.json").read_text())["sigma"]
    assert set(both["spearman"]) == {"log q(z)", "log mixture"}
    assert both["drawn"] == "log mixture"
    assert list(both["kinds"]) == ["posterior", "mixture of 2", "prior", "prior x 3"]
    vaescale("latents", run, "--draws", 1).assert_refused(2, "--draws: 1 must be at least 2")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_mixture_is_fitted_on_two_processes(vaescale, run: Path, tmp_path: Path) -> None:
    """As a person launches it, from encoding to the last picture."""
    alone = vaescale("fit-gmm", run, "--components", 3, "--json").json
    for path in (run / "latents").rglob("*"):
        if path.is_file():
            path.unlink()
    launcher = ["accelerate.commands.launch", "--config_file", "recipes/backends/cpu2.yaml"]
    words = ["tools/fit_gmm.py", str(run), "--components", "3", "--json"]
    done = finished([sys.executable, "-m", *launcher, *words], ROOT)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["val_nats"] == pytest.approx(alone["val_nats"], abs=1e-3)


def test_open_trained_gives_the_trained_weights(run: Path) -> None:
    ema, raw = open_trained(run), open_trained(run, weights="raw")
    assert (ema.weights, raw.weights, raw.step) == ("ema", "raw", 12)
    pairs = zip(ema.model.parameters(), raw.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(ema.model.likelihood.state.running, raw.model.likelihood.state.running)


@pytest.mark.parametrize("verb", ["evaluate", "encode", "fit-gmm", "sample", "latents", "sync", "baselines"])
def test_a_folder_that_is_no_run_is_refused(vaescale, tmp_path: Path, verb: str) -> None:
    vaescale(verb, tmp_path).assert_refused(2, "is not a run folder")


@pytest.mark.parametrize(
    "words",
    [
        *(["evaluate"], ["encode"], ["fit-gmm"], ["sample"], ["latents"], ["baselines"]),
        ["quality", "--features", "pixels"],
        ["export", "out"],
    ],
)
def test_a_run_without_a_checkpoint_is_refused(vaescale, run: Path, words: list[str]) -> None:
    for path in run.glob("checkpoints/*/manifest.json"):
        path.unlink()
    vaescale(words[0], run, *words[1:]).assert_refused(2, "none of the 2 checkpoints")


def test_a_mixture_of_other_weights_is_refused(vaescale, run: Path, recipe_file, recipe_content) -> None:
    """The same recipe trained anew, by other code perhaps, is another model at the same step."""
    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    from vaescale.mixtures import files

    words = files.read_details(run / "gmm")
    files.save(files.load(str(run / "gmm")), run / "gmm", {**words, "weights_hash": "another"})
    for verb in (["sample", run], ["latents", run], ["export", run, run / "out"]):
        vaescale(*verb).assert_refused(2, "weights_hash another", "vaescale fit-gmm")
    vaescale("quality", run, "--features", "pixels").assert_refused(2, "weights_hash another")


def test_large_seeds(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["seed"] = 20240601120000
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    run = recipe_content["run_dir"]
    assert vaescale("latents", run, "--draws", 10, "--seed", 5_000_000_000).code == 0
    assert vaescale("fit-gmm", run, "--components", 2, "--seed", 5_000_000_000).code == 0


def test_sync_without_a_store_is_refused(vaescale, run: Path) -> None:
    vaescale("sync", run).assert_refused(2, "tracking.mlflow: null")


@pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves
def test_all_results_reach_mlflow(
    vaescale, recipe_file, recipe_content, tmp_path: Path, empty_store: Path
) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe_content["tracking"] = {"mlflow": uri, "experiment": "verbs"}
    run = recipe_content["run_dir"]
    for words in (
        ("train", recipe_file(recipe_content)),
        ("evaluate", run),
        ("fit-gmm", run),
        ("sample", run),
        ("sync", run),
    ):
        outcome = vaescale(*words)
        assert outcome.code == 0, outcome.err
    client = MlflowClient(uri)
    state = json.loads((Path(run) / "mlflow.json").read_text())
    stored = client.get_run(state["run_id"])
    assert {"git_revision", "recipe_hash", "data_hash", "world_size"} <= stored.data.tags.keys()
    assert stored.data.params["likelihood.sigma"] == "optimal"
    assert stored.info.status == "FINISHED"
    assert stored.info.end_time >= stored.info.start_time
    assert "system/cpu_utilization_percentage" in stored.data.metrics
    assert {
        "train/neg_elbo_nats",
        "train/sigma",
        "val/bits_per_dim",
        "gmm/val_log_density_nats",
    } <= stored.data.metrics.keys()
    assert len(client.get_metric_history(state["run_id"], "train/sigma")) == 12
    assert {item.path for item in client.list_artifacts(state["run_id"], "figures")} == {
        "figures/calibration.png",
        "figures/curves.png",
        "figures/progress",
        "figures/reconstructions.png",
        "figures/samples.png",
    }


def test_doctor_tells_versions_and_the_launch(vaescale, monkeypatch) -> None:
    outcome = vaescale("doctor", "--json")
    assert outcome.json["torch"] == torch.__version__
    assert outcome.json["launch"] == "one process"
    assert outcome.json["cores"] >= 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "launcher started one" in vaescale("doctor").out


def test_samples_do_not_depend_on_how_many_are_drawn(run: Path) -> None:
    from vaescale import noise

    trained = open_trained(run)
    few, many = (
        trained.model.likelihood.mean(trained.model.from_prior(noise.Stream(0, 0, torch.arange(n))))
        for n in (2, 5)
    )
    np.testing.assert_allclose(few.detach(), many[:2].detach(), atol=1e-6)


@pytest.fixture
def ladder_run(vaescale, recipe_file, recipe_content) -> Path:
    """Three draws for each image, KL balancing: everything at once that a flat network has not."""
    recipe_content["network"] = {"kind": "ladder", "latent_dim": 2, "width": 8, "checkpointing": True}
    recipe_content["posterior"] = {"kind": "relative"}
    recipe_content["likelihood"] = {"kind": "discretized_logistic_mixture", "components": 2}
    recipe_content["objective"] = {"balancing": "while_annealing", "beta": {"schedule": "linear", "steps": 6}}
    recipe_content["objective"]["spectral"] = 0.01
    recipe_content["optimizer"]["skip_factor"] = 10
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    return Path(recipe_content["run_dir"])


def test_a_mixture_of_several_groups_of_a_ladder(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["network"] = {"kind": "ladder", "latent_dim": 2, "width": 8}
    recipe_content["likelihood"] = {"kind": "gaussian", "sigma": 0.1}
    recipe_content["objective"] = {"kind": "elbo", "beta": 0}
    recipe_content["optimizer"]["lr"] = 1e-2
    recipe_content["training"] |= {"steps": 60, "evaluate_every": 60, "checkpoint_every": 60, "ema_decay": 0}
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    ladder_run = Path(recipe_content["run_dir"])
    outcome = vaescale(
        "fit-gmm", ladder_run, "--groups", 5, "--components", 2, "--covariance", "diag", "--json"
    )
    assert outcome.code == 0, outcome.err
    trained = open_trained(ladder_run)
    size = sum(trained.model.group_sizes[:5])
    assert mixture_files.load(ladder_run / "gmm").means.shape == (2, size)
    assert (
        outcome.json["replaces"]
        == "the prior of the first 5 groups, together, of 7; the other groups keep theirs"
    )
    assert outcome.json["samples_per_image"] == 8
    assert vaescale("sample", ladder_run, "--prior", "gmm", "--count", 4).code == 0
    assert vaescale("latents", ladder_run).code == 0
    again = vaescale(
        "fit-gmm", ladder_run, "--groups", 5, "--components", 2, "--covariance", "diag", "--json"
    )
    assert again.json["val_nats"] == outcome.json["val_nats"]
    online = vaescale("fit-gmm", ladder_run, "--groups", 5, "--online", 1, "--covariance", "diag", "--json")
    assert online.code == 0, online.err
    assert vaescale("verify-shards", ladder_run / "latents" / "train-top5", "--deep").code == 0
    vaescale("fit-gmm", ladder_run, "--groups", 8).assert_refused(2, "a ladder of 7 groups")
    vaescale("fit-gmm", ladder_run, "--groups", 2, "--samples-per-image", 0).assert_refused(2, "no moments")


def test_a_flat_run_has_one_group(vaescale, run: Path) -> None:
    vaescale("fit-gmm", run, "--groups", 2).assert_refused(2, "a flat model")


def test_a_ladder_is_trained_evaluated_and_sampled(drawn_curves, vaescale, ladder_run: Path) -> None:
    rows = [json.loads(line) for line in (ladder_run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train/beta" in row]
    assert [row["train/beta"] for row in train] == pytest.approx([min(1, s / 6) for s in range(12)])
    assert all(row["train/skipped_steps"] == 0 for row in train)
    groups = [name for name in train[-1] if name.startswith("train/group_kl_nats/")]
    assert len(groups) == 7
    assert sum(train[-1][name] for name in groups) == pytest.approx(train[-1]["train/kl_nats"])
    assert 0 <= train[-1]["train/collapsed_share"] <= 1
    outcome = vaescale("evaluate", ladder_run, "--importance-samples", 5, "--importance-images", 50, "--json")
    metrics = outcome.json["metrics"]
    assert metrics["importance_images"] == 50
    assert metrics["images"] == 360
    assert metrics["neg_iwae_nats"] < metrics["neg_elbo_nats"] + 5
    assert "neg_iwae_nats" in outcome.json["protocol"]
    sampled = vaescale("sample", ladder_run, "--count", 9, "--temperature", 0.8, "--json")
    assert sampled.code == 0, sampled.err
    assert sampled.json["priors"] == ["prior"]
    assert "train/spectral" in train[-1]
    assert (ladder_run / "figures" / "samples.png").is_file()
    with Image.open(ladder_run / "figures" / "groups.png") as groups:
        assert len(groups.getcolors(1 << 20)) > 2, "groups in their colours on white"
    vaescale("fit-gmm", ladder_run).assert_refused(
        2, "the posterior of the top group has collapsed"
    )  # after 12 steps


def test_strange_numbers_are_refused(vaescale, run: Path) -> None:
    for word in ("--importance-samples", "--importance-images"):
        vaescale("evaluate", run, word, 0).assert_refused(2, f"{word}: 0 must be from 1 to")
    vaescale("sample", run, "--temperature", 0).assert_refused(2, "argument --temperature: 0 must be above 0")


def test_a_latent_map_is_fitted_and_sampled(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["network"] = {
        "kind": "resnet",
        "latent_dim": 1,
        "width": 8,
        "multipliers": [1, 1, 1],
        "blocks": 1,
    }
    recipe_content["objective"] = {"kind": "iwae", "samples": 2}
    recipe_content["likelihood"]["sigma"] = 0.05
    outcome = vaescale("train", recipe_file(recipe_content), "training.steps=4")
    assert outcome.code == 0, outcome.err
    folder = recipe_content["run_dir"]
    fitted = vaescale("fit-gmm", folder, "--components", 2, "--json")
    assert fitted.code == 0, fitted.err
    assert mixture_files.load(Path(folder) / "gmm").means.shape == (2, 4)
    assert vaescale("sample", folder, "--count", 4, "--json").json["priors"] == ["prior", "mixture"]
