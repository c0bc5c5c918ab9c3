"""A model of a run's latents: trained as any run, and a prior of that run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_latents import moments_of, written
from vaescale import noise
from vaescale.aggregate.prepared import Preparation, prepare, scale_of
from vaescale.aggregate.second_stage import SecondStage, draws
from vaescale.commands.train import train
from vaescale.data.batch import Request
from vaescale.data.latent_shards import Standardized
from vaescale.data.loader import training_batches
from vaescale.data.plan import Plan
from vaescale.data.reader import open_reader
from vaescale.errors import DataError
from vaescale.recipe import load_recipe
from vaescale.trained import build_model, open_trained


def recipe_of(train_set: Path, val_set: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """A small model of latents [4]."""
    data = {"train": str(train_set), "val": str(val_set), "holds": "latents", "image_size": 1, "channels": 4}
    return {
        "name": run.name,
        "run_dir": str(run),
        "data": {**data, "global_batch": 64, "cache": "memory"} | changes.pop("data", {}),
        "network": {"kind": "mlp", "latent_dim": 3, "widths": [16]},
        "likelihood": {"kind": "gaussian", "sigma": "optimal", "mean": "identity"},
        "optimizer": {"kind": "adamw", "lr": 2e-3},
        "training": {"steps": 8, "precision": "fp32", "log_every": 1, "checkpoint_every": 4},
        "tracking": {"mlflow": None},
    } | changes


@pytest.fixture
def second(vaescale, run: Path, tmp_path: Path, recipe_file) -> Path:
    """Eight steps on the latents of `run`, interrupted after four of them."""
    assert vaescale("encode", run).code == 0
    folders = (run / "latents/train", run / "latents/val")
    content = recipe_of(*folders, tmp_path / "second")
    assert (
        vaescale("train", recipe_file(content), "training.steps=4", "optimizer.schedule=constant").code == 0
    )
    words = ("training.steps=8", "optimizer.schedule=constant", "--allow-changes")
    outcome = vaescale("train", recipe_file(content), *words)
    assert outcome.code == 0, outcome.err
    assert (
        f"next: vaescale sample RUN --prior {tmp_path / 'second'}, where RUN is the folder of tiny"
        in outcome.err
    )
    return tmp_path / "second"


def test_it_goes_on_as_if_it_had_not_stopped(vaescale, run: Path, second: Path, recipe_file) -> None:
    content = recipe_of(run / "latents/train", run / "latents/val", second.with_name("whole"))
    words = ("training.steps=8", "optimizer.schedule=constant", "data.cache=none", "data.workers=0")
    assert vaescale("train", recipe_file(content), *words).code == 0
    name = "checkpoints/step-000000008/model.safetensors"
    assert (second / name).read_bytes() == (second.with_name("whole") / name).read_bytes()
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert "val/neg_elbo_nats" in rows[-1]
    assert not any(key.endswith("bits_per_dim") for row in rows for key in row), "latents have no levels"
    assert not (second / "figures/progress").exists(), "latents are no pictures"


def test_it_is_a_prior_of_its_run_and_of_no_other(
    vaescale, run: Path, second: Path, recipe_file, recipe_content, tmp_path: Path
) -> None:
    drawn = vaescale("sample", run, "--prior", second, "--count", 9, "--json").json
    assert (drawn["priors"], drawn["components"]) == (["second stage"], [])
    words = ("--prior", second, "--decode", "mean", "--count", 9, "--shards", tmp_path / "shards")
    assert vaescale("sample", run, *words).code == 0
    made = json.loads((tmp_path / "shards/index.json").read_text())["made"]
    assert made["second_stage"]["weights_hash"] == open_trained(second, of_latents=True).weights_hash
    judged = vaescale(
        "quality", run, "--features", "pixels", "--decode", "mean", "--prior", second, "--json"
    ).json
    assert [row["of"] for row in judged["rows"]][-2:] == ["prior", "second stage"]
    assert judged["second_stage"]["run"] == str(second)

    for verb in (("sample",), ("evaluate",), ("encode",), ("quality", "--features", "pixels"), ("fit-gmm",)):
        vaescale(verb[0], second, *verb[1:]).assert_refused(
            2, "is a model of the latents in", "sample RUN --prior"
        )
    vaescale("sample", run, "--prior", run).assert_refused(
        2, "was not trained on latents", "data.holds=latents"
    )
    vaescale("sample", run, "--prior", "gmmm").assert_refused(
        2, "prior must be 'standard', 'gmm' or", "'gmmm'"
    )
    vaescale("sample", run, "--prior", second, "--components", 2).assert_refused(
        2, "--components chooses a mixture"
    )
    vaescale("sample", run, "--prior", second, "--refine", 2).assert_refused(
        2, "--refine needs a density of z"
    )
    recipe_content |= {"run_dir": str(tmp_path / "other"), "seed": 1}
    assert vaescale("train", recipe_file(recipe_content)).code == 0
    vaescale("sample", tmp_path / "other", "--prior", second).assert_refused(
        2,
        "was trained on latents of tiny at step 12 (ema weights)",
        f"not the ema weights of {tmp_path / 'other'}",
    )


def test_what_does_not_fit_is_refused(
    vaescale, run: Path, recipe_file, recipe_content, tmp_path: Path
) -> None:
    assert vaescale("encode", run, "--split", "train").code == 0
    assert vaescale("encode", run, "--split", "train", "--draws", 2).code == 0
    assert vaescale("encode", run, "--split", "train", "--standardize", "channel").code == 0
    latents = run / "latents"
    content = recipe_of(latents / "train", latents / "train", tmp_path / "second")
    refused = {
        (2, "data.channels=17", "data.holds=images"): "channels (=17) must be",
        (2, "data.flip=true"): "flip (=True) needs images",
        (2, "likelihood.mean=sigmoid"): "data.holds (='latents') needs an unbounded mean",
        (2, "likelihood.dequantize=true"): "data.holds (='latents') needs an unbounded mean",
        (3, "data.channels=3"): "holds latents of shape [4]; set data.channels=4 and data.image_size=1",
        (3, "data.channels=3", "data.holds=images"): "holds latents, not images",
        (3, f"data.train={latents / 'train-draws2'}"): "holds draws",
        (
            3,
            f"data.val={latents / 'train-channel'}",
        ): "hold latents or codes that differ in their standardized",
        (3, f"data.train={recipe_content['data']['train']}"): "holds no latents",
    }
    for (code, *words), message in refused.items():
        vaescale("train", recipe_file(content), *words).assert_refused(code, message)
    assert not (tmp_path / "second").exists()


def test_the_draws_of_a_step_depend_on_the_slot_alone(tmp_path: Path) -> None:
    """Any number of ranks, and workers, sees the same z; each step sees another one."""
    latents = written(tmp_path / "latents", moments_of(0), kind="latents")
    data = {"image_size": 3, "channels": 2, "global_batch": 10, "cache": "none"}
    content = recipe_of(latents.folder, latents.folder, tmp_path / "run", data=data)
    recipe = type(load_recipe(Path("vaescale:digits/optimal"))).model_validate(content)
    reader, model = open_reader(str(latents.folder), recipe.data), build_model(recipe)
    plan = Plan(reader.index.shards.samples, 10, 0, 100)

    def targets(rank: int, ranks: int) -> list[torch.Tensor]:
        steps = training_batches(
            reader, plan, steps=range(6), rank=rank, world_size=ranks, accumulation=1, workers=0
        )
        return [
            model.target(batch.images, noise.Stream(0, step, batch.slots))
            for step, (batch,) in enumerate(steps)
        ]

    whole, halves = targets(0, 1), [targets(rank, 2) for rank in (0, 1)]
    for step, z in enumerate(whole):
        assert torch.equal(z, torch.cat([half[step] for half in halves]))
    numbers = [torch.from_numpy(plan.samples(step)) for step in range(6)]
    both = [(int(a), int(b)) for a in range(10) for b in range(10) if numbers[0][a] == numbers[5][b]]
    assert both, "step 5 is in the next epoch"
    assert not any(torch.equal(whole[0][a], whole[5][b]) for a, b in both)
    moments = torch.from_numpy(moments_of(0))[numbers[0]]
    epsilon = noise.normal(noise.Stream(0, 0, torch.arange(10)), noise.LATENT, (2, 3, 3))
    torch.testing.assert_close(whole[0], moments[:, 0] + torch.exp(0.5 * moments[:, 1]) * epsilon)
    with (latents.folder / "shard-000000.tar").open("r+b") as tar:
        tar.seek(1500)
        tar.write(b"\xff" * 64)
    (fault,) = reader.__getitems__(Request(np.arange(4))).faults
    assert fault.reason == "changed"


def test_it_learns_the_aggregate_posterior_in_the_scale_of_the_latents(tmp_path: Path) -> None:
    views = [written(tmp_path / "latents", moments_of(0, images=400), kind="latents", run="known")]
    scale = scale_of(views)
    shards = prepare(views, tmp_path / "scaled", Preparation(standardize="channel"), scale=scale, draw_seed=0)
    data = {"image_size": 3, "channels": 2}
    content = recipe_of(shards.folder, shards.folder, tmp_path / "run", data=data)
    content["training"] |= {"steps": 100, "log_every": 100, "checkpoint_every": 100}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(content))
    train(load_recipe(recipe))
    trained = open_trained(tmp_path / "run", of_latents=True)
    assert trained.latents_of["run"] == "known"
    stage = SecondStage(
        trained.model, Standardized(*map(tuple, trained.latents_of["standardized"].values())), {}
    )
    stream = noise.Stream(0, 0, torch.arange(4000))
    z = draws(stage, stream).view(-1, 2, 9)
    assert z.mean((0, 2)).tolist() == pytest.approx(scale.mean, abs=0.15)
    assert z.std((0, 2)).tolist() == pytest.approx(scale.std, rel=0.1)
    few = draws(stage, stream._replace(slots=torch.arange(7, 12)))
    torch.testing.assert_close(few, z[7:12].flatten(1))
    narrow = draws(stage, stream, temperature=0.01).view(-1, 2, 9)
    assert (narrow.std(0).mean(1) < 0.02 * z.std(0).mean(1)).all()
    own = noise.normal(stream, noise.DECODER, (18,))
    correlation = torch.corrcoef(torch.stack([own[:, 0], z.flatten(1)[:, 0]]))[0, 1]
    assert abs(correlation) < 0.1, "the first model's decoder draws other noise from the same stream"


def test_damaged_latents_of_both_splits_must_be_alike(tmp_path: Path) -> None:
    one = written(tmp_path / "one", moments_of(0), kind="latents", weights_hash="a")
    two = written(tmp_path / "two", moments_of(1), kind="latents", weights_hash="b")
    recipe = tmp_path / "recipe.json"
    data = {"image_size": 3, "channels": 2, "global_batch": 10}
    recipe.write_text(json.dumps(recipe_of(one.folder, two.folder, tmp_path / "run", data=data)))
    with pytest.raises(DataError, match="hold latents or codes that differ in their weights_hash"):
        train(load_recipe(recipe))
