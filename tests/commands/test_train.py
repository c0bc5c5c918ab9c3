"""Whole runs in one process: the run folder, going on after a stop, and what is refused."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.runs.folder import read_metrics

TRAIN_METRICS = {
    "neg_elbo_nats",
    "log_px_nats",
    "kl_nats",
    "bits_per_dim",
    "mse",
    "sigma",
    "grad_norm",
    "lr",
    "beta",
}


def lines(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def numbers(run: str | Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    rows = read_metrics(Path(run))
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith(("perf/", "system/"))}
        for row in rows
    ]


def test_a_run_folder_holds_what_is_promised(drawn_curves, vaescale, recipe_file, recipe_content) -> None:
    outcome = vaescale("train", recipe_file(recipe_content), "--json")
    assert outcome.code == 0, outcome.err
    run = Path(recipe_content["run_dir"])
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "figures",
    }
    rows = lines(run)
    train = [row for row in rows if "train/mse" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert {name.removeprefix("train/") for name in train[0]} >= TRAIN_METRICS
    perf = ("images_per_second", "step_seconds", "data_wait_fraction", "memory_bytes")
    assert all(train[0][f"perf/{name}"] >= 0 for name in perf)
    assert [row["step"] for row in rows if "val/mse" in row] == [6, 12]
    assert outcome.json["step"] == 12
    assert outcome.json["val"]["images"] == 360
    assert train[-1]["train/neg_elbo_nats"] < train[0]["train/neg_elbo_nats"]
    tags = json.loads((run / "run.json").read_text())
    assert {"git_revision", "recipe_hash", "data_hash", "plan_hash", "world_size"} <= tags.keys()
    with Image.open(run / "figures" / "curves.png") as curves:
        assert curves.format == "PNG"
        assert len(curves.getcolors(1 << 20)) > 2, "lines in their colours on white"


def test_words_go_to_stderr_and_json_alone_to_stdout(vaescale, recipe_file, recipe_content) -> None:
    outcome = vaescale("train", recipe_file(recipe_content), "training.log_every=6", "--json")
    assert len(outcome.out.splitlines()) == 1
    said = outcome.err.splitlines()
    opening = next(number for number, line in enumerate(said) if line.startswith("train tiny into "))
    assert "1437 images 8x8x1 of" in said[opening]
    assert said[opening].endswith("12 steps of 64 images, 22 to an epoch")
    assert re.match(
        r"train tiny  1/12 steps  8%  epoch 1 of 1  \d:\d\d elapsed  loss -?[\d.]+ nats$", said[opening + 1]
    )
    assert any(line.startswith("train tiny  12/12 steps  100%  epoch 1 of 1") for line in said)


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulated": ({"accumulation": 2}, {}),
    "no ema, mixed sets": ({"ema_decay": 0.0}, {}),
    "shared": ({}, {"sigma": "shared"}),
    "per pixel, running": ({"accumulation": 2}, {"sigma": "optimal_per_pixel", "sigma_source": "running"}),
    "per image": ({}, {"sigma": "optimal_per_image"}),
    # Its ramp begins before the stop and ends after it.
    "handover": ({}, {"sigma": "predicted", "handover": {"at_step": 5, "ramp_steps": 5}}),
}


MIXED = (("train", 1), ("val", 3))
AUGMENT = {"shift": 1, "crop": {"scale": [0.7, 1]}, "turns": "quarter", "jitter": {"contrast": 0.2}}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_bit_equal_to_never_stopping(
    vaescale, recipe_file, recipe_content, make_items, tmp_path, case, monkeypatch
) -> None:
    extra, likelihood = RESUMED[case]
    recipe_content["training"] |= extra
    recipe_content["likelihood"] |= likelihood
    if "mixed sets" in case:  # the smaller one is in its second pass at the end
        sets = [{"path": recipe_content["data"][name], "weight": weight} for name, weight in MIXED]
        recipe_content["data"] |= {"train": sets, "balance": "class", "flip": True, "augment": AUGMENT}
        write_shards(make_items(90), tmp_path / "third", Making())
        recipe_content["data"]["val"] = str(tmp_path / "third")
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    path = recipe_file(recipe_content)
    assert vaescale("train", path, f"run_dir={straight}").code == 0

    from vaescale.training.recorder import Recorder

    real = Recorder.log

    def stop_at_nine(self, step, metrics):
        real(self, step, metrics)
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "log", stop_at_nine)
        assert vaescale("train", path, f"run_dir={stopped}").code == 130
    assert not (Path(stopped) / "lock").exists()
    again = vaescale("train", path, f"run_dir={stopped}")
    assert again.code == 0, again.err
    assert [row["step"] for row in lines(stopped) if "train/mse" in row] == [*range(1, 10), *range(7, 13)]
    assert numbers(straight) == numbers(stopped)
    names = ["model", "optimizer"] + (["ema"] if extra.get("ema_decay") != 0.0 else [])
    for name in names:
        a, b = (
            load_file(Path(run) / "checkpoints/step-000000012" / f"{name}.safetensors")
            for run in (straight, stopped)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_a_damaged_checkpoint_is_passed_over(vaescale, recipe_file, recipe_content) -> None:
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    assert vaescale("train", path).code == 0
    expected = numbers(run)
    os.truncate(run / "checkpoints/step-000000012/model.safetensors", 100)
    outcome = vaescale("train", path)
    assert outcome.code == 0
    assert "skipping checkpoint" in outcome.err
    assert numbers(run) == expected


def test_a_lost_last_checkpoint_leaves_no_stale_results(
    drawn_curves, vaescale, recipe_file, recipe_content
) -> None:
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    first = vaescale("train", path, "--json").json
    curves = (run / "figures" / "curves.png").read_bytes()
    os.truncate(run / "checkpoints/step-000000012/model.safetensors", 100)
    again = vaescale("train", path, "optimizer.lr=0.05", "--allow-changes", "--json").json
    assert again["step"] == first["step"] == 12
    (last,) = [row for row in lines(run)[-3:] if "val/mse" in row]
    assert again["val"]["mse"] == last["val/mse"] != first["val"]["mse"]
    assert again["train"]["lr"] == pytest.approx(lines(run)[-2]["train/lr"])
    assert (run / "figures" / "curves.png").read_bytes() != curves
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "train/mse" in row] == list(range(1, 13))
    assert rows[-1]["val/mse"] == last["val/mse"]


def test_a_finished_run_is_not_trained_again(vaescale, recipe_file, recipe_content) -> None:
    path = recipe_file(recipe_content)
    first = vaescale("train", path, "--json")
    before = lines(recipe_content["run_dir"])
    again = vaescale("train", path, "--json")
    assert "trained to step 12 already" in again.err
    assert again.json == first.json
    assert lines(recipe_content["run_dir"]) == before


def test_the_seed_decides(vaescale, recipe_file, recipe_content, tmp_path) -> None:
    path = recipe_file(recipe_content)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert vaescale("train", path, f"run_dir={tmp_path / name}", f"seed={seed}").code == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_cache_and_workers_do_not_change_the_curve(vaescale, recipe_file, recipe_content, tmp_path) -> None:
    path = recipe_file(recipe_content)
    assert vaescale("train", path, f"run_dir={tmp_path / 'a'}").code == 0
    assert vaescale("train", path, f"run_dir={tmp_path / 'b'}", "data.cache=none", "data.workers=2").code == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_bf16_stays_close_to_fp32(vaescale, recipe_file, recipe_content, tmp_path) -> None:
    path = recipe_file(recipe_content)
    for precision in ("fp32", "bf16"):
        assert (
            vaescale("train", path, f"run_dir={tmp_path / precision}", f"training.precision={precision}").code
            == 0
        )
    for a, b in zip(numbers(tmp_path / "fp32"), numbers(tmp_path / "bf16"), strict=True):
        assert b["train/sigma"] == pytest.approx(a["train/sigma"], rel=0.02)


def test_another_recipe_s_folder_is_refused(vaescale, recipe_file, recipe_content) -> None:
    path = recipe_file(recipe_content)
    assert vaescale("train", path).code == 0
    before = (Path(recipe_content["run_dir"]) / "recipe.yaml").read_text()
    outcome = vaescale("train", path, "optimizer.lr=1e-4", "seed=3")
    outcome.assert_refused(2, "optimizer.lr: 0.002 -> 0.0001", "seed: 0 -> 3", "choose another name")
    assert (Path(recipe_content["run_dir"]) / "recipe.yaml").read_text() == before
    vaescale("train", path, "training.resume=never").assert_refused(2, "training.resume is never")


def test_a_change_that_is_allowed_is_remembered(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["likelihood"]["horizon_steps"] = 20  # by default it depends on the number of steps
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    assert vaescale("train", path).code == 0
    more = ("optimizer.lr=1e-4", "training.steps=15")
    vaescale("train", path, *more).assert_refused(2, "training.steps: 12 -> 15", "--allow-changes")
    outcome = vaescale("train", path, *more, "--allow-changes")
    assert outcome.code == 0, outcome.err
    assert "continuing from step 12 with optimizer.lr: 0.002 -> 0.0001" in outcome.err
    assert [row["step"] for row in lines(run) if "train/mse" in row] == list(range(1, 16))
    (change,) = json.loads((run / "run.json").read_text())["changes"]
    assert change == {"step": 12, "changes": ["optimizer.lr: 0.002 -> 0.0001", "training.steps: 12 -> 15"]}
    assert vaescale("train", path, *more).code == 0, "it is the run's recipe now"


def test_the_best_checkpoint_is_kept(vaescale, recipe_file, recipe_content) -> None:
    recipe_content["training"] |= {"evaluate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 1}
    best = "training.keep_best=val/kl_nats"  # it grows: the first is the smallest
    assert vaescale("train", recipe_file(recipe_content), best).code == 0
    found = Path(recipe_content["run_dir"]) / "checkpoints"
    kl = {row["step"]: row["val/kl_nats"] for row in lines(found.parent) if "val/mse" in row}
    expected = {min(kl, key=kl.get), 12}
    assert {int(path.name.removeprefix("step-")) for path in found.iterdir()} == expected
    other = ("run_dir=" + str(found.parent) + "-2",)
    vaescale("train", recipe_file(recipe_content), *other, "training.keep_best=val/nothing").assert_refused(
        2, "training.keep_best is 'val/nothing'; the metrics measured are val/active_units"
    )
    vaescale("train", recipe_file(recipe_content), best, "training.evaluate_every=3").assert_refused(
        2, "keep_best needs each checkpoint's own evaluation"
    )


def test_a_folder_of_other_files_is_refused(vaescale, recipe_file, recipe_content) -> None:
    run = Path(recipe_content["run_dir"])
    run.mkdir()
    (run / "thesis.tex").write_text("")
    vaescale("train", recipe_file(recipe_content)).assert_refused(2, "holds files but no run")
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


def test_other_data_is_refused(vaescale, recipe_file, recipe_content, tmp_path, make_items) -> None:
    from vaescale.data.making.writing import write_shards

    assert vaescale("train", recipe_file(recipe_content)).code == 0
    write_shards(make_items(1437), tmp_path / "other")
    outcome = vaescale("train", recipe_file(recipe_content), f"data.train={tmp_path / 'other'}")
    outcome.assert_refused(3, "was made with other data")


def test_missing_data_and_indivisible_batches_are_refused(vaescale, recipe_file, recipe_content) -> None:
    path = recipe_file(recipe_content)
    vaescale("train", path, "data.train=/nowhere").assert_refused(
        3,
        "data folder /nowhere does not exist",
        "make-shards",
    )
    vaescale("train", path, "training.accumulation=3").assert_refused(2, "data.global_batch (=64)", "use 63")
    vaescale("train", path, "data.global_batch=5000").assert_refused(3, "exceeds the 1437 training samples")
    vaescale("train", path, "data.image_size=6").assert_refused(2, "cannot be halved 2 times", "use 4 or 8")
    vaescale("train", path, "--processes", "2").assert_refused(2, "2 processes were asked for, but 1 started")
    assert not Path(recipe_content["run_dir"]).exists()


def test_a_held_lock_is_refused_and_a_dead_one_taken(vaescale, recipe_file, recipe_content) -> None:
    from vaescale.runs.folder import locked

    run = Path(recipe_content["run_dir"])
    run.mkdir()
    with locked(run):
        vaescale("train", recipe_file(recipe_content)).assert_refused(
            2, "another process trains in", str(os.getpid())
        )
    assert not (run / "lock").exists()
    (run / "lock").write_text("")  # of a process that was killed before it wrote its name
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    assert not (run / "lock").exists()


def test_a_start_that_was_killed_early_is_taken_over(vaescale, recipe_file, recipe_content) -> None:
    run = Path(recipe_content["run_dir"])
    run.mkdir()
    (run / "lock").write_text("{")
    (run / ".recipe.yaml.tmp-7").write_text("nam")
    assert vaescale("train", recipe_file(recipe_content)).code == 0


def test_a_run_killed_after_its_last_checkpoint_is_summed_up(vaescale, recipe_file, recipe_content) -> None:
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    first = vaescale("train", path, "--json").json
    (run / "summary.json").unlink()
    (run / "figures" / "curves.png").unlink()
    assert vaescale("train", path, "--json").json == first
    assert (run / "figures" / "curves.png").is_file()


def test_checkpoints_of_another_order_are_refused(vaescale, recipe_file, recipe_content) -> None:
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    assert vaescale("train", path).code == 0
    folder = run / "checkpoints/step-000000012"
    state = (folder / "state.json").read_text().replace('"plan_hash": "', '"plan_hash": "0')
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(state),
        "sha256": hashlib.sha256(state.encode()).hexdigest(),
    }
    (folder / "state.json").write_text(state)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    vaescale("train", path).assert_refused(2, "has another plan_hash")


def test_training_without_an_average_evaluates_as_evaluate_does(
    vaescale, recipe_file, recipe_content
) -> None:
    recipe_content["training"] |= {"ema_decay": 0.0, "precision": "bf16"}
    during = vaescale("train", recipe_file(recipe_content), "--json").json["val"]
    after = vaescale("evaluate", recipe_content["run_dir"], "--json").json["metrics"]
    assert {k: v for k, v in during.items() if k != "step"} == {k: after[k] for k in during if k != "step"}


def overwrite(folder: Path, shard: str, places: slice) -> int:
    """Damage images of a shard in the middle. Returns how many."""
    entries = np.load(folder / f"{shard}.index.npy")[places]
    with (folder / f"{shard}.tar").open("r+b") as tar:
        for entry in entries:
            tar.seek(entry["offset"] + entry["bytes"] // 2)
            tar.write(b"damaged")
    return len(entries)


CACHE_AND_WORKERS = [("memory", 0), ("none", 0), ("none", 2)]


@pytest.mark.parametrize(("cache", "workers"), CACHE_AND_WORKERS)
def test_a_damaged_shard_stops_with_one_sentence(
    vaescale, recipe_file, recipe_content, tmp_path, digits, cache, workers
) -> None:
    data = shutil.copytree(digits / "train", tmp_path / "damaged")
    overwrite(data, "shard-000001", slice(None))
    recipe_content["data"] |= {"train": str(data), "cache": cache, "workers": workers}
    outcome = vaescale("train", recipe_file(recipe_content))
    outcome.assert_refused(
        3, "images could not be used", " changed)", "data.max_skipped (=0.001)", "verify-shards"
    )
    assert "its bytes are not those that were indexed" in outcome.err


@pytest.mark.parametrize(("cache", "workers"), CACHE_AND_WORKERS)
def test_a_few_damaged_images_are_counted_and_too_many_stop(
    vaescale, recipe_file, recipe_content, tmp_path, digits, cache, workers
) -> None:
    data = shutil.copytree(digits / "train", tmp_path / "damaged")
    count = overwrite(data, "shard-000001", slice(0, 300, 60))
    recipe_content["data"] |= {"train": str(data), "cache": cache, "workers": workers, "max_skipped": 0.01}
    recipe_content["training"]["steps"] = 22  # an epoch
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("skipped (changed)") == count
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [row.get("data/skipped/changed", 0) for row in rows if "train/mse" in row]
    assert counts == sorted(counts)
    assert counts[-1] == count
    outcome = vaescale(
        "train", recipe_file(recipe_content), "data.max_skipped=0.002", f"run_dir={tmp_path}/other"
    )
    outcome.assert_refused(3, "images could not be used", "data.max_skipped (=0.002)")


def test_damaged_held_out_images_are_left_out_and_counted(
    vaescale, recipe_file, recipe_content, tmp_path, digits
) -> None:
    data = shutil.copytree(digits / "val", tmp_path / "damaged")
    count = overwrite(data, "shard-000000", slice(0, 300, 60))
    recipe_content["data"] |= {"val": str(data), "max_skipped": 0.1}
    metrics = vaescale("train", recipe_file(recipe_content), "--json").json["val"]
    assert (metrics["images"], metrics["skipped"]) == (360 - count, count)
    assert vaescale("evaluate", recipe_content["run_dir"], "--json").json["metrics"]["skipped"] == count
    overwrite(data, "shard-000000", slice(None))
    vaescale("evaluate", recipe_content["run_dir"]).assert_refused(
        3, "360 of 360 images to evaluate cannot be used"
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_training_from_a_url_is_training_from_the_folder(
    vaescale, recipe_file, recipe_content, tmp_path, digits
) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{digits}/", "/digits/", recursive=True)
    recipe_content["data"] |= {"cache": "none", "workers": 0, "cache_dir": str(tmp_path / "cache")}
    path = recipe_file(recipe_content)
    assert vaescale("train", path, f"run_dir={tmp_path}/local").code == 0
    places = [f"data.{split}=memory://digits/{split}" for split in ("train", "val")]
    outcome = vaescale("train", path, *places, f"run_dir={tmp_path}/remote")
    assert outcome.code == 0, outcome.err
    assert numbers(tmp_path / "local") == numbers(tmp_path / "remote")
    small = vaescale("train", path, *places, "data.cache_bytes=100000", f"run_dir={tmp_path}/small")
    small.assert_refused(3, "data.cache_bytes (=100000) is less than", "data.shuffle_block")


def test_files_in_the_way_are_named(vaescale, recipe_file, recipe_content, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    vaescale("train", recipe_file(recipe_content), f"run_dir={tmp_path}/file").assert_refused(
        2, f"{tmp_path}/file"
    )
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    (Path(recipe_content["run_dir"]) / "run.json").write_text("")
    vaescale("train", recipe_file(recipe_content)).assert_refused(2, "run.json is damaged")


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(vaescale, recipe_file, recipe_content) -> None:
    outcome = vaescale("train", recipe_file(recipe_content), "optimizer.lr=1e30")
    outcome.assert_refused(4, "lower optimizer.lr")
    assert not list(Path(recipe_content["run_dir"]).glob("checkpoints/step-*"))


def test_a_guard_that_skips_resumes_bit_equal(vaescale, recipe_file, recipe_content, tmp_path) -> None:
    """A factor barely above 1 skips some of the steps; what is usual is part of the checkpoint."""
    recipe_content["optimizer"] |= {"skip_factor": 1.01, "lr": 1e-6}
    recipe_content["objective"] = {"spectral": 0.1}  # has a state of its own, too
    recipe_content["training"] |= {"steps": 60, "checkpoint_every": 30, "keep_checkpoints": 5}
    recipe = recipe_file(recipe_content)
    curves = []
    for name in ("whole", "parts"):
        run = tmp_path / name
        assert vaescale("train", recipe, f"run_dir={run}").code == 0
        if name == "parts":
            shutil.rmtree(run / "checkpoints" / "step-000000060")
            (run / "metrics.jsonl").unlink()
            assert vaescale("train", recipe, f"run_dir={run}").code == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "train/mse" in row]
        curves.append([(row["train/loss_nats"], row["train/skipped_steps"]) for row in rows][-30:])
    assert curves[0] == curves[1]
    assert 0 < curves[0][-1][1] < 60


def test_a_dry_run_describes_and_writes_nothing(
    vaescale, recipe_file, recipe_content, make_items, tmp_path: Path
) -> None:
    outcome = vaescale("train", recipe_file(recipe_content), "--dry-run", "--json", "optimizer.lr=5e-4")
    assert outcome.code == 0, outcome.err
    plan = outcome.json["plan"]
    assert outcome.json["recipe"]["optimizer"]["lr"] == 5e-4
    assert plan["steps_per_epoch"] == 22
    assert plan["images_per_process_and_step"] == 64
    assert plan["memory_peak_bytes"] > 16 * plan["parameters"]
    assert plan["starts"] == f"at step 0, in {recipe_content['run_dir']}"
    assert not Path(recipe_content["run_dir"]).exists()
    places = [recipe_content["data"][split] for split in ("train", "val")]
    mixed = f"data.train=[{{path: {places[0]}, weight: 1}}, {{path: {places[1]}, weight: 3}}]"
    refused = vaescale("train", recipe_file(recipe_content), "--dry-run", mixed)
    refused.assert_refused(3, f"data.train mixes in {places[1]}, whose 360 images are those of data.val")
    write_shards(make_items(90), tmp_path / "other", Making())
    words = vaescale(
        *("train", recipe_file(recipe_content), "--dry-run", mixed, "data.augment.shift=1"),
        f"data.val={tmp_path / 'other'}",
        "data.channels=3",
    )
    assert words.err.count("1887 images are grey (") == 1
    assert words.err.count("data.channels=3 repeats their one channel") == 1
    assert (
        f"1797 images: {places[0]} 0.312 passes (25.0% of the images); {places[1]} 3.74 passes" in words.out
    )
    assert "shifts of up to 1 pixels (edge): the density of this run is of such augmented images" in words.out
    assert "steps_per_epoch" in words.out
    assert "latent_dim: 4" in words.out


def test_training_and_a_description_are_functions(recipe_content) -> None:
    """As a notebook calls them, one after another in one process."""
    from accelerate.state import AcceleratorState, GradientState

    from vaescale.commands.train import describe, train
    from vaescale.recipe import Recipe

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    recipe = Recipe.model_validate(recipe_content)
    assert describe(recipe)["plan"]["train_images"] == 1437
    assert not Path(recipe.run_dir).exists()
    result = train(recipe)
    assert (result["run_dir"], result["step"]) == (recipe.run_dir, 12)
    assert result["val"]["images"] == 360
    assert train(recipe) == result


def test_evaluation_in_training_has_the_precision_of_evaluate(
    vaescale, recipe_file, recipe_content, monkeypatch
) -> None:
    """TF32 rounds each product to 10 bits: held-out numbers of training would not be those of `vaescale evaluate`."""
    from vaescale.training import recorder

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen: dict[str, list[tuple[bool, bool]]] = {"evaluate": [], "glimpse": [], "log": []}

    def noting(name: str, function):
        def noted(*arguments, **options):
            seen[name].append(flags())
            return function(*arguments, **options)

        return noted

    for name in ("evaluate", "glimpse"):
        monkeypatch.setattr(recorder, name, noting(name, getattr(recorder, name)))
    monkeypatch.setattr(recorder.Recorder, "log", noting("log", recorder.Recorder.log))
    before = flags()
    try:
        assert vaescale("train", recipe_file(recipe_content), "training.precision=tf32").code == 0
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert seen["evaluate"] == seen["glimpse"] == [(False, False)] * 2
    assert seen["log"] == [(True, True)] * 12, "and steps after an evaluation are in TF32 again"


def test_evaluations_of_some_held_out_images(
    vaescale, recipe_file, recipe_content, monkeypatch, tmp_path
) -> None:
    from vaescale.evaluation.likelihood import evaluate
    from vaescale.runs.folder import read_metrics
    from vaescale.system import console
    from vaescale.trained import in_order, open_split, open_trained

    monkeypatch.setattr(console, "LINE_EVERY_SECONDS", 0.0)
    done = vaescale("train", recipe_file(recipe_content), "training.evaluate_images=70")
    assert done.code == 0
    assert "evaluate: 70 of 70 held-out images" in done.err
    rows = [row for row in read_metrics(tmp_path / "run") if "val/mse" in row]
    assert [row["val/images"] for row in rows] == [70, 70]
    trained = open_trained(tmp_path / "run")
    first = in_order(open_split(trained.recipe, "val"), images=70)
    again = evaluate(trained.model, first, seed=trained.recipe.seed)
    assert rows[-1]["val/neg_elbo_nats"] == pytest.approx(again["neg_elbo_nats"], rel=1e-6)


def test_all_evaluations_have_the_same_worker_processes(
    vaescale, recipe_file, recipe_content, monkeypatch
) -> None:
    from vaescale.data.workers import Workers

    seen: list[tuple[int, bool, list[int]]] = []
    real = Workers.fetch

    def noting(self, requests, *, last_pass=False):
        batches = real(self, requests, last_pass=last_pass)
        seen.append((len(self.reader), last_pass, self.pids))
        return batches

    monkeypatch.setattr(Workers, "fetch", noting)
    recipe_content["data"] |= {"cache": "none", "workers": 2}
    recipe_content["training"]["evaluate_every"] = 4
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    (training,) = [pids for images, last_pass, pids in seen if last_pass]
    first, *others = [pids for images, last_pass, pids in seen if images == 360]
    assert len(first) == 2
    assert others == [first, first]
    assert not set(first) & set(training)
