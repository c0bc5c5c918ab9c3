"""A conditional run through the verbs: training, bounds by class, samples of a class, mixtures, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import binomtest

import vaescale as package
from tests.conftest import Outcome, run_verb, tiny_recipe
from vaescale import noise
from vaescale.commands.initial_weights import begin
from vaescale.data.batch import Batch
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.evaluation.classes import bounds_by_class, wilson
from vaescale.evaluation.measures import Seen
from vaescale.recipe import recipe_of
from vaescale.trained import build_model, build_objective, in_order, open_split, open_trained

Verb = Callable[..., Outcome]


def conditional_recipe(digits: Path, run: Path) -> dict[str, Any]:
    condition = {"kind": "class", "classes": 10, "width": 8, "dropout": 0.2, "prior": True}
    return {**tiny_recipe(digits, run), "condition": condition}


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional run with mixtures of its classes. Read only, but for pictures and results."""
    folder = tmp_path_factory.mktemp("conditional")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(conditional_recipe(digits, folder / "run"), sort_keys=False))
    assert run_verb("train", recipe) == 0
    fit = ("--per-class", "--components", "1", "--covariance", "diag", "--samples-per-image", 1)
    assert run_verb("fit-gmm", folder / "run", *fit) == 0
    return folder / "run"


def test_a_resumed_run_has_the_same_bits(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    resumed = shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/step-000000012")
    assert vaescale("train", run / "recipe.yaml", f"run_dir={resumed}").code == 0
    files = [folder / "checkpoints/step-000000012/model.safetensors" for folder in (run, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_conditional_model_may_begin_as_an_unconditional_run(trained_run: Path, digits: Path) -> None:
    content = conditional_recipe(digits, trained_run)
    model, plain = build_model(recipe_of(content)), open_trained(trained_run).model
    begun = begin(model, recipe_of(content, {"init_from.path": str(trained_run)}))
    assert begun is not None
    assert "network.decoder_modulations.1.linear.weight" in begun.sentence
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 5, 9])
    with torch.no_grad():
        assert torch.equal(model.eval().given(y).reconstruct(x), plain.reconstruct(x))


def test_terms_of_the_loss_pass_the_class_on(digits: Path, tmp_path: Path) -> None:
    content = conditional_recipe(digits, tmp_path / "run")
    content["condition"]["prior"] = False
    terms = {
        "mmd": {"weight": 1.0},
        "dip": {"variant": "ii"},
        "adversarial": {"widths": [8], "start_step": 0},
    }
    recipe = recipe_of({**content, "objective": {"kind": "elbo", **terms}})
    model = build_model(recipe)
    objective = build_objective(recipe, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * ("modulation" in name)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    stream, mask = noise.Stream(0, 1, torch.arange(6)), torch.ones(6, dtype=torch.bool)
    shown = []
    for y in (0, 1):
        computed = model.train()(images, stream, mask, condition=torch.full((6,), y))
        assert computed.shown is not None
        shown.append(computed.shown.reconstructed)
    differs = (shown[0] - shown[1]).abs().flatten(1).amax(1) > 1e-4
    assert differs.any(), "what a discriminator and a perceptual distance see"
    loss, pieces = objective(computed, stream)
    assert {"mmd", "dip"} <= pieces.keys()
    loss.backward()
    assert model.embedding is not None
    assert bool(model.embedding.table.weight.grad[1].any())


def test_bounds_by_class_and_the_classes_that_they_choose(run: Path, vaescale: Verb) -> None:
    result = vaescale("evaluate", run, "--per-class", "--json").json
    metrics, table = result["metrics"], result["classes"]
    assert [row["class"] for row in table] == [str(number) for number in range(10)]
    images = np.array([row["images"] for row in table])
    assert images.sum() == metrics["images"]
    for metric in ("neg_elbo_nats", "kl_nats", "log_px_nats"):
        mean = images @ np.array([row[metric] for row in table]) / images.sum()
        assert mean == pytest.approx(metrics[metric], rel=1e-6)
    confusion = np.array(result["confusion"])
    assert (confusion.sum(1) == images).all()
    assert metrics["class_accuracy"] == pytest.approx(np.trace(confusion) / images.sum())

    trained = open_trained(run)
    reader = open_split(trained.recipe, "val")
    labels = reader.labels()
    assert (np.bincount(labels) == images).all()
    frequencies = torch.tensor(json.loads((run / "classes.json").read_text())["frequencies"]).double()
    (batch,) = in_order(reader)
    with torch.no_grad():
        seen = Seen(trained.model, batch, seed=trained.recipe.seed)
        bounds, log_weights = bounds_by_class(trained.model, seen, 10, lambda _: None)
    own = bounds[torch.arange(len(labels)), batch.labels]
    assert -float(own.mean()) == pytest.approx(metrics["neg_elbo_nats"], rel=1e-5)
    chosen = (bounds + frequencies.log()).argmax(1)
    assert float((chosen == batch.labels).double().mean()) == pytest.approx(metrics["class_accuracy"])
    marginal = torch.logsumexp(log_weights + frequencies.log(), dim=1).mean()
    assert metrics["neg_marginal_nats"] == pytest.approx(-float(marginal), rel=1e-5)
    opened = package.load(run)
    given = opened.elbo(batch.images[:5].numpy(), classes=batch.labels[:5].tolist())
    np.testing.assert_allclose(given, own[:5].numpy(), rtol=1e-4)


def test_the_interval_of_a_share_is_wilson_s() -> None:
    for right, number in ((0, 10), (7, 10), (930, 1000), (1000, 1000)):
        interval = binomtest(right, number).proportion_ci(method="wilson")
        assert wilson(right, number) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_samples_have_their_class(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    how = ("--prior", "gmm", "--decode", "mean")
    written = {}
    for name, options in (
        ("by frequency", ("--count", 40)),
        ("fewer", ("--count", 10)),
        ("three", ("--count", 8, "--class", "3")),
    ):
        folder = tmp_path / name
        assert vaescale("sample", run, *how, *options, "--shards", folder).code == 0
        reader = open_split(open_trained(run).recipe, "val", place=str(folder))
        written[name] = Batch(*reader.__getitems__(_request(len(reader)))[:2], torch.zeros(0), torch.zeros(0))
    many, few, three = (written[name] for name in ("by frequency", "fewer", "three"))
    assert len(set(many.labels.tolist())) > 5
    assert torch.equal(many.labels[:10], few.labels)
    assert torch.equal(many.images[:10], few.images)
    assert set(three.labels.tolist()) == {3}
    again = package.load(run).sample(8, prior="gmm", class_name="3")
    levels = (255 * again.clip(0, 1)).round().astype(np.uint8)
    assert (levels == three.images.numpy()).all()


def _request(count: int) -> Any:
    from vaescale.data.batch import Request

    return Request(np.arange(count))


def test_pictures_of_classes(run: Path, vaescale: Verb) -> None:
    drawn = vaescale("sample", run, "--count", 4, "--json").json
    names = [Path(path).name for path in drawn["figures"]]
    mixtures = "samples-classes-mixtures-of-the-classes.png"
    assert names == ["samples.png", "samples-classes.png", mixtures]
    drawn = vaescale("sample", run, "--between", "3,8", "--json").json
    assert Path(drawn["figure"]).is_file()
    assert vaescale("sample", run, "--interpolate", "0,1").code == 0
    assert vaescale("sample", run, "--class", "none", "--prior", "standard", "--count", 4).code == 0


def test_mixtures_and_distances_of_classes(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    rows = json.loads((run / "gmm/classes/selection.json").read_text())["classes"]
    reader = open_split(open_trained(run).recipe, "train")
    labels = reader.labels()
    assert [row["images"] for row in rows] == np.bincount(labels).tolist()
    assert all(row["val_nats"] > row["prior_val_nats"] for row in rows)
    options = ("--features", "pixels", "--decode", "mean", "--per-class", "--cache", tmp_path, "--json")
    result = vaescale("quality", run, *options).json
    assert result["classes"] == [str(number) for number in range(10)]
    by_name = {row["of"]: row["frechet_by_class"] for row in result["rows"]}
    assert by_name.keys() == {"held-out images", "reconstructions", "prior", "mixtures of the classes"}
    assert all(len(distances) == 10 for distances in by_name.values())
    real, samples = (np.mean(by_name[name]) for name in ("held-out images", "prior"))
    assert real < samples


def test_an_exported_graph_takes_the_class(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    assert vaescale("export", run, tmp_path / "out", "--format", "torch_export").code == 0
    described = json.loads((tmp_path / "out/vaescale.json").read_text())
    assert described["graphs"]["encode"]["input"] == {"images": ["N", 1, 8, 8], "y": ["N"]}
    program = torch.export.load(tmp_path / "out/encode.pt2").module()
    images, y = torch.rand(3, 1, 8, 8), torch.tensor([4, 1, 7])
    mean, _ = program(images, y)
    with torch.no_grad():
        expected = open_trained(run).model.given(y).posterior(images).mu
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("score", "RUN", "DATA"), "score has no class for each image"),
        (("latents", "RUN"), "take evaluate"),
        (("baselines", "RUN"), "take evaluate"),
        (("fit-gmm", "RUN"), "give --per-class"),
        (("fit-prior", "RUN"), "codes"),
        (("export", "RUN", "OUT", "--format", "diffusers"), "torch_export takes it"),
        (("sample", "RUN", "--class", "ten"), "class 'ten' is not a class of this run"),
        (("sample", "RUN", "--refine", 2), "--refine has no class for each image"),
        (("sample", "RUN", "--prior", "RUN"), "a model of latents has no class for each image"),
        (("sample", "RUN", "--prior", "gmm", "--class", "none", "--count", 4), "have none for `none`"),
        (("sample", "PLAIN", "--class", "3"), "needs a conditional run"),
        (("sample", "PLAIN", "--between", "3,4"), "needs a conditional run"),
        (("quality", "PLAIN", "--features", "pixels", "--per-class"), "needs a run that is given classes"),
    ],
)
def test_what_cannot_know_the_class_is_refused(
    run: Path,
    trained_run: Path,
    digits: Path,
    tmp_path: Path,
    vaescale: Verb,
    words: tuple[object, ...],
    sentence: str,
) -> None:
    meant = {"RUN": run, "PLAIN": trained_run, "DATA": digits / "val", "OUT": tmp_path / "out"}
    vaescale(*(meant.get(str(word), word) for word in words)).assert_refused(2, sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"network": {"kind": "ladder", "latent_dim": 2}}, "needs a single latent vector or map"),
        ({"objective": {"kind": "elbo", "spectral": 1.0}}, "needs a loss of a conditional model"),
        ({"objective": {"kind": "elbo", "mmd": {"weight": 1.0}}}, "set it to false, or leave objective.mmd"),
        ({"objective": {"kind": "vae_gan"}}, "needs a loss of a conditional model"),
        (
            {
                "network": {"kind": "conv", "latent_dim": 2, "widths": [8], "latent_map": True},
                "posterior": {"kind": "quantized"},
            },
            "needs a Gaussian q(z|x)",
        ),
        ({"training": {"compile": True}}, "needs an uncompiled model"),
        ({"condition": {"classes": 5}}, "images of DIGITS/train have a class above 4; set condition.classes"),
        ({"condition": {"dropout": 1.0}}, "condition.dropout"),
    ],
)
def test_recipes_without_a_place_for_the_class_are_refused(
    digits: Path,
    tmp_path: Path,
    recipe_file: Callable[..., str],
    vaescale: Verb,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    content = conditional_recipe(digits, tmp_path / "run")
    for section, values in changes.items():
        below = {} if "kind" in values else content.get(section, {})
        content[section] = {**below, **values}
    outcome = vaescale("train", recipe_file(content))
    outcome.assert_refused(3 if "images of" in sentence else 2, sentence.replace("DIGITS", str(digits)))


def test_images_without_classes_are_counted_before_training(
    digits: Path,
    tmp_path: Path,
    recipe_file: Callable[..., str],
    vaescale: Verb,
    make_items: Callable[..., list[Item]],
) -> None:
    items = [
        item._replace(label=-1 if number % 4 == 0 else item.label)
        for number, item in enumerate(make_items(80))
    ]
    write_shards(items, tmp_path / "some", Making())
    content = conditional_recipe(digits, tmp_path / "run")
    content["data"]["train"] = str(tmp_path / "some")
    outcome = vaescale("train", recipe_file(content))
    outcome.assert_refused(3, "20 of 80 images", "have no class, which condition.kind=class needs")
    assert not (tmp_path / "run").exists()
