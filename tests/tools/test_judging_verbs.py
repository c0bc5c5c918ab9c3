"""The verbs that judge, compare, vary and export runs, as a person would call them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.several import Command, several
from tests.launching import ROOT
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.perceptual.classifier import Classifier, Shape, save
from vaescale.trained import open_split, open_trained


def test_evaluate_takes_other_images(vaescale, run: Path, digits: Path) -> None:
    outcome = vaescale("evaluate", run, "--data", digits / "train", "--name", "elsewhere", "--json")
    assert outcome.json["metrics"]["images"] == 1437
    assert (run / "evaluation" / "elsewhere.json").is_file()
    vaescale("evaluate", run, "--data", digits / "val", "--name", "elsewhere").assert_refused(
        2, "for other images", "--name"
    )
    vaescale("evaluate", run, "--name", "../x").assert_refused(2, "not a valid file name")
    vaescale("evaluate", run, "--split", "train", "--data", digits / "val").assert_refused(2, "--split")
    vaescale("evaluate", run, "--importance-images", 5).assert_refused(2, "--importance-samples")
    vaescale("evaluate", run, "--data", digits / "none").assert_refused(3, "none")


def test_what_importance_sampling_found_is_kept(vaescale, run: Path) -> None:
    words = ("evaluate", run, "--importance-samples", 8, "--importance-images", 50)
    first = vaescale(*words, "--json").json
    found = first["metrics"]
    assert found["iwae_bits_per_dim"] == pytest.approx(found["neg_iwae_nats"] / (64 * np.log(2)) + 8)
    outcome = vaescale("evaluate", run, "--importance-samples", 4)
    assert "with 8 importance samples in evaluation/val.json will be replaced" in outcome.err
    assert "log p(x) is noticeably above" in outcome.err
    assert vaescale("evaluate", run, *words[2:]).code == 0
    assert "8 importance samples of 50 images" in first["measured"]["evaluation/val/neg_iwae_nats"]
    again = vaescale("evaluate", run, "--json").json
    assert again["metrics"] == found
    assert again["protocol"] == first["protocol"]
    path = run / "evaluation" / "val.json"
    for name in ("weights_hash", "code"):
        path.write_text(json.dumps({**first, name: "another"}))
        assert "neg_iwae_nats" not in vaescale("evaluate", run, "--json").json["metrics"], name


@pytest.fixture
def bare(digits: Path, tmp_path: Path) -> Path:
    """The digits without their classes, in train and val; and some of 12x12 in large."""
    generator = np.random.default_rng(0)
    for name, size, count in (("train", 8, 90), ("val", 8, 30), ("large", 12, 30)):
        images = generator.integers(0, 256, (count, size, size, 1), dtype=np.uint8)
        items = [Item(f"{number:05d}", image, -1) for number, image in enumerate(images)]
        write_shards(items, tmp_path / "bare" / name, Making())
    return tmp_path / "bare"


def test_images_without_classes_and_of_other_sizes(
    vaescale, run: Path, bare: Path, digits: Path, tmp_path: Path, recipe_file, recipe_content
) -> None:
    features = ("--out", tmp_path / "features", "--steps", 4)
    vaescale("train-features", bare / "train", *features).assert_refused(3, "have no classes", "labelled")
    vaescale("train-features", digits / "train", "--val", bare / "val", *features).assert_refused(
        3, f"images of {bare}/val", "have no classes"
    )
    (tmp_path / "file").touch()
    vaescale("train-features", digits / "train", "--out", tmp_path / "file").assert_refused(2, "is a file")
    vaescale("train-features", digits / "train", "--val", bare / "large", *features).assert_refused(
        3, "same shape", "12x12"
    )
    vaescale("evaluate", run, "--data", bare / "large").assert_refused(3, "12x12")
    recipe_content["data"] |= {"train": str(bare / "train"), "val": str(bare / "val"), "global_batch": 30}
    recipe_content["run_dir"] = str(tmp_path / "unlabelled")
    assert vaescale("train", recipe_file(recipe_content, "unlabelled.yaml")).code == 0
    assert vaescale("evaluate", tmp_path / "unlabelled").code == 0
    outcome = vaescale("baselines", tmp_path / "unlabelled", "--json")
    assert outcome.code == 0, outcome.err
    assert "no probes: the images have no classes" in outcome.json["notes"]
    assert "linear_probe" not in outcome.json["rows"]["tiny"]
    shape = Shape(1, 12, 3, 4)
    save(Classifier(shape), shape, tmp_path / "large", {"accuracy": 0.5})
    vaescale("quality", run, "--features", tmp_path / "large").assert_refused(2, "1x12x12", "1x8x8")


def test_quality_judges_samples_by_features(vaescale, run: Path, digits: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    vaescale("quality", run, "--features", features).assert_refused(2, "vaescale train-features")
    trained = vaescale(
        "train-features", digits / "train", "--out", features, "--steps", 60, "--width", 12, "--json"
    )
    assert trained.code == 0, trained.err
    assert trained.json["accuracy"] > 0.5
    assert trained.json["held_out_images"] == 360
    vaescale("train-features", digits / "train", "--out", features).assert_refused(2, "already")
    assert vaescale("fit-gmm", run, "--components", "1,2").code == 0
    words = ("quality", run, "--count", 200, "--cache", tmp_path / "cache", "--json", "--features")
    outcome = vaescale(*words, features)
    assert outcome.code == 0, outcome.err
    rows = {(row["of"], row["decode"]): row for row in outcome.json["rows"]}
    assert len(rows) == 2 + 3 * 2
    assert rows["held-out images", ""]["frechet"] < rows["prior", "mean"]["frechet"]
    assert outcome.json["references_from_cache"] is False
    again = vaescale(*words, features)
    assert again.json["references_from_cache"] is True
    assert again.json["rows"] == outcome.json["rows"]
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    assert vaescale(*words, features).json["rows"] == outcome.json["rows"]
    pixels = vaescale(*words, "pixels", "--decode", "mean")
    assert pixels.json["rows"][0]["frechet"] != outcome.json["rows"][0]["frechet"]
    raw = vaescale(*words, "pixels", "--weights", "raw")
    assert "left out" in raw.err
    assert [row["of"] for row in raw.json["rows"]] == ["held-out images", "reconstructions", "prior", "prior"]
    assert (run / "figures" / "quality-pixels.png").is_file()
    vaescale(*words, tmp_path / "m.pt2").assert_refused(2, "does not exist")
    (tmp_path / "m.pt2").write_bytes(b"a program")
    vaescale(*words, tmp_path / "m.pt2", "--trust-features").assert_refused(2, "cannot be loaded")
    vaescale(*words, tmp_path / "m.pt2").assert_refused(2, "--trust-features")
    vaescale(*words, "inception:/nowhere").assert_refused(2, "not at /nowhere", "train-features")
    (features / "features.safetensors").write_bytes(b"cut")
    vaescale(*words, features).assert_refused(2, "damaged")


def test_features_of_an_exported_module(vaescale, run: Path, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "linear.pt2")
    words = ("quality", run, "--count", 50, "--cache", tmp_path, "--trust-features", "--json")
    outcome = vaescale(*words, "--features", tmp_path / "linear.pt2")
    assert outcome.code == 0, outcome.err
    assert outcome.json["features"] == "linear"
    assert "linear.pt2" in outcome.json["protocol"]["features"]
    for name, wrong, options in (
        ("of two", module, {"args": (torch.zeros(2, 1, 8, 8),)}),
        ("large", torch.nn.Flatten(), {"args": (torch.zeros(2, 1, 9, 9),), "dynamic_shapes": ({0: batch},)}),
    ):
        torch.export.save(torch.export.export(wrong, **options), tmp_path / f"{name}.pt2")
        vaescale(*words, "--features", tmp_path / f"{name}.pt2").assert_refused(2, "1x8x8", "dynamic_shapes")


def test_runs_are_compared_from_their_folders(
    vaescale, run: Path, recipe_file, recipe_content, tmp_path: Path
) -> None:
    others = []
    for name, change in (
        ("again", {"seed": 1}),
        ("wide", {"likelihood": {"kind": "gaussian", "sigma": 0.5}}),
    ):
        content = {**recipe_content, "name": name, "run_dir": str(tmp_path / name), **change}
        assert vaescale("train", recipe_file(content, f"{name}.yaml")).code == 0
        others.append(tmp_path / name)
    assert vaescale("sample", run, "--count", 4).code == 0
    outcome = vaescale("compare-runs", run, *others, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json["runs"]
    bounds = [one["val/neg_elbo_nats"] for one in found]
    assert bounds == sorted(bounds)
    assert {one["likelihood.sigma"] for one in found} == {"optimal", 0.5}
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 1 + 3, (
        "curves and plane, samples, and ends of trainings"
    )
    assert "http" not in page.replace("http-equiv", "")
    table = vaescale("compare-runs", run, *others, "--out", tmp_path / "out", "--sort", "val/psnr")
    table.assert_refused(2, "no run has the metric 'val/psnr'")
    words = ("compare-runs", run, *others, "--out", tmp_path / "out")
    printed = vaescale(*words).out
    assert "|" not in printed
    assert re.search(r"^tiny +-?\d", printed, re.MULTILINE)
    assert vaescale(*words, "--markdown").out.startswith((tmp_path / "out" / "comparison.md").read_text())
    vaescale("compare-runs", run).assert_refused(2, "at least two")
    words = ("compare-runs", run, *others, "--sort", "quality/digits/prior-mean/frechet")
    vaescale(*words).assert_refused(2, "`vaescale quality RUN`")
    vaescale("compare-runs").assert_refused(2, "--experiment")
    vaescale("compare-runs", run, tmp_path / "none").assert_refused(2, "is not a run folder")


def test_baselines_are_exact(vaescale, run: Path, digits: Path) -> None:
    """PCA's likelihood by the covariance that Tipping & Bishop's maximum-likelihood estimate has, eq. 7 and 8."""
    vaescale("baselines", run).assert_refused(2, "is not evaluated at step 12", "vaescale evaluate")
    assert vaescale("evaluate", run).code == 0
    outcome = vaescale("baselines", run, "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json["rows"]
    recipe = open_trained(run).recipe
    train, val = (
        torch.cat([reader[n].images for n in range(len(reader))]).flatten(1).double() / 255
        for reader in (open_split(recipe, "train"), open_split(recipe, "val"))
    )
    values, vectors = torch.linalg.eigh(torch.cov(train.T))
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[4:].mean()
    weight = vectors[:, :4] * (values[:4] - noise).sqrt()
    covariance = weight @ weight.T + noise * torch.eye(64).double()
    exact = torch.distributions.MultivariateNormal(train.mean(0), covariance).log_prob(val).mean()
    ppca = rows["pPCA, 4 latents"]
    assert ppca["nll_nats"] == pytest.approx(-float(exact), abs=1e-6)
    assert ppca["sigma"] == pytest.approx(float(noise.sqrt()), rel=1e-6)
    assert ppca["bits_per_dim"] == pytest.approx(-float(exact) / (64 * np.log(2)) + 8)
    assert 0.5 < ppca["linear_probe"] <= 1
    assert 0.1 < rows["tiny"]["knn_5"] <= 1
    assert (run / "figures" / "baselines.png").is_file()
    assert vaescale("evaluate", run, "--data", digits / "train", "--name", "val").code == 2, (
        "no other images' numbers"
    )
    few = vaescale("baselines", run, "--labels", 20, "--json").json["rows"]
    assert few["pPCA, 4 latents"]["linear_probe"] < ppca["linear_probe"]
    assert "linear_probe" in vaescale("baselines", run).out
    vaescale("baselines", run, "--groups", 2).assert_refused(2, "1 group")


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
def test_an_exported_run_is_loaded_by_mlflow(vaescale, run: Path, tmp_path: Path) -> None:
    import mlflow

    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    out = tmp_path / "exported"
    outcome = vaescale("export", run, out, "--json")
    assert outcome.code == 0, outcome.err
    vaescale("export", run, out).assert_refused(2, "already exists")
    vaescale("export", run, tmp_path / "other", "--log").assert_refused(2, "no MLflow store")
    for path in out.rglob("*"):
        is_code = path.is_relative_to(out / "code") and path.suffix in (
            ".py",
            ".pyi",
            ".typed",
            ".cpp",
            ".h",
            ".js",
            ".css",
        )
        assert is_code or path.suffix in ("", ".yaml", ".json", ".safetensors", ".txt", ".md"), path
    model = mlflow.pyfunc.load_model(str(out))
    trained = open_trained(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        x = trained.model.target(torch.from_numpy(images), None)
        wanted = trained.model.likelihood.mean(trained.model.reconstruct(x))
        latents = trained.model.posterior(x).mu
    np.testing.assert_allclose(model.predict(images), wanted, atol=1e-6)
    np.testing.assert_allclose(model.predict(images, params={"mode": "encode"}), latents, atol=1e-6)
    drawn = model.predict(images, params={"mode": "sample", "prior": "gmm", "decode": "ancestral", "seed": 3})
    assert drawn.shape == (3, 1, 8, 8)
    assert not np.allclose(drawn, model.predict(images, params={"mode": "sample"}))
    served = model._model_impl
    with pytest.raises(ValueError, match=r"mode \(='dream'\) must be one of reconstruct, encode, sample"):
        served.predict(images, {"mode": "dream"})
    with pytest.raises(ValueError, match="give them as uint8"):
        served.predict(images.astype(np.float32))
    assert vaescale("sample", out / "data" / "run", "--count", 4).code == 0
    assert open_trained(out / "data" / "run").recipe.tracking.mlflow is None, "it is no run of an experiment"
    assert open_trained(out / "data" / "run").recipe.hash == trained.recipe.hash


def sweep_words(content: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A recipe whose runs lie in runs/ of the working folder, and two variants of it."""
    content = {
        **content,
        "run_dir": "runs/${name}",
        "tracking": {"mlflow": "sqlite:///mlflow.db", "experiment": "s"},
    }
    return content, ("seed=0,1", "training.steps=6")


@pytest.fixture
def sweep(vaescale, recipe_file, recipe_content, tmp_path: Path, empty_store: Path, monkeypatch) -> Path:
    """The folder of a sweep over two seeds. Its runs lie in runs/ of the working folder, MLflow's store is mlflow.db there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    content, words = sweep_words(recipe_content)
    outcome = vaescale("sweep", recipe_file(content), *words, "--json")
    assert outcome.code == 0, outcome.err
    assert [one["exit_code"] for one in outcome.json["variants"]] == [0, 0]
    bounds = [one["val/neg_elbo_nats"] for one in outcome.json["best_first"]]
    assert bounds == sorted(bounds)
    assert len(bounds) == 2
    return Path("runs/tiny-sweep")


STORE = ("--experiment", "s", "--store", "sqlite:///mlflow.db")


@pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves
def test_a_sweep_trains_all_below_one_run(
    vaescale, sweep: Path, recipe_file, recipe_content, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    content, words = sweep_words(recipe_content)
    assert len(vaescale("sweep", recipe_file(content), *words, "--dry-run", "--json").json["variants"]) == 2
    vaescale("sweep", recipe_file(content), "objective.beat=1,2").assert_refused(
        2, "unknown key objective.beat"
    )
    state = json.loads((sweep / "sweep.json").read_text())
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("s").experiment_id
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{state['mlflow_run']}'")
    assert {run.info.run_name for run in below} == {"tiny-seed-0", "tiny-seed-1"}
    inputs = {one.tags[0].value: one.dataset.digest for one in below[0].inputs.dataset_inputs}
    tags = below[0].data.tags
    assert inputs == {"training": tags["data_hash"][:36], "validation": tags["val_data_hash"][:36]}
    written = vaescale("sweep", recipe_file(content), *words, "--write", "slurm", "--json")
    assert written.code == 0, written.err
    again = json.loads((sweep / "sweep.json").read_text())
    assert (again["mlflow_run"], again["runs"]) == (state["mlflow_run"], state["runs"])
    assert len(vaescale("compare-runs", sweep, "--json").json["runs"]) == 2
    a_store_s_runs_are_compared_and_have_models(vaescale, sweep, recipe_file, recipe_content, tmp_path)
    Path("runs/tiny-seed-1/metrics.jsonl").unlink()
    (sweep / "sweep.json").write_text(json.dumps({**state, "runs": [*state["runs"], "runs"]}))
    few = vaescale("compare-runs", sweep)
    few.assert_refused(2, "only one run has metrics to compare")
    assert "left out: runs/tiny-seed-1 has no metrics yet" in few.err
    assert "left out: runs is not a run folder" in few.err
    failed = vaescale(
        "sweep", recipe_file(content), "seed=5,6", "data.train=nowhere", "--name", "wild", "--json"
    )
    assert failed.code == 3
    assert [one["exit_code"] for one in failed.json["variants"]] == [3, 3]
    assert "best_first" not in failed.json
    assert "left out" not in failed.err, "each failure was said when it happened"


def a_store_s_runs_are_compared_and_have_models(
    vaescale, sweep: Path, recipe_file, recipe_content, tmp_path: Path
) -> None:
    """A part of the test above, whose sweep takes many seconds to train."""
    import mlflow

    one = sweep.parent / "tiny-seed-0"
    logged = vaescale("export", one, tmp_path / "exported", "--log", "--json")
    assert logged.code == 0, logged.err
    model = mlflow.pyfunc.load_model(logged.json["model_uri"])
    assert model.predict(np.zeros((2, 1, 8, 8), np.uint8)).shape == (2, 1, 8, 8)
    run_id = json.loads((one / "mlflow.json").read_text())["run_id"]
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id).info.status == "FINISHED"
    compared = vaescale("compare-runs", *STORE, "--where", "params.seed != ''", "--json")
    assert compared.code == 0, compared.err
    assert {one["name"] for one in compared.json["runs"]} == {"tiny-seed-0", "tiny-seed-1"}
    assert {one["seed"] for one in compared.json["runs"]} == {"0", "1"}
    assert compared.json["figures"]
    for more, message in (
        (("--experiment", "none"), "has no experiment 'none'; there are"),
        (("--where", "nonsense"), "MLflow at"),
        (("--where", "params.seed = '7'"), "has no runs"),
        (("--store", "sqlite:///none.db"), "does not exist"),
    ):
        vaescale("compare-runs", *STORE, *more).assert_refused(2, message)
    content, _ = sweep_words(recipe_content)
    words = ("train", recipe_file(content), "name=tiny-seed-0", "seed=0", "training.steps=9")
    vaescale(*words).assert_refused(2, "--allow-changes")
    assert vaescale(*words, "--allow-changes").code == 0
    found = vaescale("compare-runs", *STORE, "--json").json["runs"]
    steps = {one["name"]: one["training.steps"] for one in found}
    assert steps == {"tiny-seed-0": "9", "tiny-seed-1": "6"}, "as the run went on, not as it began"


def test_more_latents_than_directions_leave_pca_what_there_is(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["network"] = {"kind": "linear", "latent_dim": 63}
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    run = recipe_content["run_dir"]
    assert vaescale("evaluate", run).code == 0
    outcome = vaescale("baselines", run, "--json")
    assert outcome.code == 0, outcome.err
    reader = open_split(open_trained(Path(run)).recipe, "train")
    images = torch.cat([reader[number].images for number in range(len(reader))]).flatten(1).double()
    rank = int(torch.linalg.matrix_rank(images - images.mean(0)))
    assert rank < 63, "some pixels are always black"
    assert np.isfinite(outcome.json["rows"][f"pPCA, {rank - 1} latents"]["nll_nats"])


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_evaluate_as_one(vaescale, run: Path, tmp_path: Path) -> None:
    """Each image once: to the rounding of sums in another order."""
    cases = (
        ("evaluate", run, "--importance-samples", 8),
        ("quality", run, "--features", "pixels", "--count", 101, "--cache", tmp_path),
        ("latents", run, "--draws", 100, "--gaps", 9, "--gap-steps", 3, "--importance-samples", 20),
        ("sample", run, "--prior", "standard", "--decode", "ancestral", "--count", 1500, "--shards", "OUT"),
        ("score", run, "digits", "--odd-class", 8, "--complexity", "png", "--maps", tmp_path / "maps"),
    )
    results = []
    for place in ("one", "two"):
        verbs = [[str(tmp_path / place) if word == "OUT" else str(word) for word in words] for words in cases]
        if place == "one":
            results.append([vaescale(*words, "--json").json for words in verbs])
        else:
            commands = [Command("ddp", [*words, "--json"]) for words in verbs]
            results.append([json.loads(printed) for printed in several(tmp_path, commands, processes=2)])
    for words, alone, together in zip(cases, *results, strict=True):
        if words[0] == "evaluate":
            assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-6)
            assert together["interval_coverage"] == pytest.approx(alone["interval_coverage"], abs=1e-4)
        elif words[0] == "latents":
            for part in ("information", "gaps", "latent_kl"):
                assert together[part] == pytest.approx(alone[part], rel=1e-4, abs=1e-4)
            for name, row in alone["noise"].items():
                assert together["noise"][name] == pytest.approx(row, rel=1e-4)
        elif words[0] == "score":
            assert together["metrics"]["images"] == pytest.approx(
                alone["metrics"]["images"], rel=1e-5, abs=1e-6
            )
            assert [one["name"] for one in together["highest"]] == [one["name"] for one in alone["highest"]]
            for one, other in zip(together["auroc"], alone["auroc"], strict=True):
                assert one["odd_images"] == other["odd_images"] > 100
                assert one["auroc"] == pytest.approx(other["auroc"], abs=1e-4)
        elif words[0] == "sample":
            assert together["data_hash"] == alone["data_hash"]
        else:
            for one, other in zip(together["rows"], alone["rows"], strict=True):
                assert (one.pop("of"), one.pop("decode")) == (other.pop("of"), other.pop("decode"))
                assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
