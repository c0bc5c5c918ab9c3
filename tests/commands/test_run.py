"""A run opened by Python: its numbers are those of the verbs, whatever form the images have."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vaescale
from vaescale.commands.run import Run, load
from vaescale.commands.sample import sample
from vaescale.commands.train_recipe import train_recipe
from vaescale.data.batch import Request
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import UserError
from vaescale.recipe import load_recipe, recipe_of
from vaescale.trained import Trained, build_model, open_split

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def opened(trained_run: Path) -> Run:
    return load(trained_run, device="cpu")


def all_of(reader: ShardReader) -> np.ndarray:
    return reader.__getitems__(Request(np.arange(len(reader)), refill=False)).images.numpy()


@pytest.fixture(scope="module")
def images(opened: Run) -> np.ndarray:
    """The held-out digits, uint8 [N, 1, 8, 8]."""
    return all_of(open_split(opened.recipe, "val"))


def untrained(name: str, digits: Path, folder: Path) -> Run:
    """A run of a shipped recipe with its first weights."""
    recipe = load_recipe(
        ROOT / f"recipes/digits/{name}.yaml", [f"data.train={digits}/train", f"data.val={digits}/val"]
    )
    return Run(Trained(folder, recipe, build_model(recipe).eval(), 0, "raw"))


def test_bounds_are_those_of_evaluate(opened: Run, images: np.ndarray, tmp_path: Path) -> None:
    metrics = vaescale.evaluate(opened, importance_samples=6)["metrics"]
    scored = tmp_path / "scores.csv"
    vaescale.score(opened, str(Path(opened.recipe.data.val)), out=scored, sort="none")
    header, *rows = [line.split(",") for line in scored.read_text().splitlines()]
    column = header.index("neg_elbo_nats")
    elbo = opened.elbo(images)
    assert elbo.dtype == np.float64
    np.testing.assert_allclose(elbo, [-float(row[column]) for row in rows], atol=1e-3)
    assert -elbo.mean() == pytest.approx(metrics["neg_elbo_nats"], abs=1e-5)
    assert -opened.log_prob(images, draws=6).mean() == pytest.approx(metrics["neg_iwae_nats"], abs=1e-5)
    assert opened.log_prob(images[:20], draws=200).mean() > elbo[:20].mean()
    np.testing.assert_allclose(opened.elbo(images[100:], first=100), elbo[100:], atol=1e-4)
    assert not np.allclose(opened.elbo(images[100:]), elbo[100:], atol=1e-4), "another slot has other noise"


def test_samples_are_those_of_the_verb(opened: Run, tmp_path: Path) -> None:
    for decode in ("mean", "ancestral"):
        out = tmp_path / decode
        sample(opened.folder, prior="standard", decode=decode, count=30, seed=3, temperature=0.8, shards=out)
        written = all_of(open_reader(str(out), opened.recipe.data))
        drawn = opened.sample(30, decode=decode, seed=3, temperature=0.8)
        levels = np.rint(255 * drawn.clip(0, 1)).astype(np.uint8)
        assert np.abs(levels.astype(int) - written).max() <= 1, "rounding of float32 alone"
        assert (levels == written).mean() > 0.999
    np.testing.assert_array_equal(opened.sample(5, layout="NHWC"), np.moveaxis(opened.sample(5), 1, -1))


def test_every_form_of_images_gives_the_same_latents(opened: Run, images: np.ndarray) -> None:
    few = images[:6]
    expected = opened.encode(few)
    assert expected.shape == (6, 4)
    forms: list[Any] = [
        *(np.moveaxis(few, 1, -1), few[:, 0], few / 255, (few / 255).astype(np.float16).astype(np.float64)),
        *(
            torch.from_numpy(few),
            torch.from_numpy(few / 255).float().permute(0, 2, 3, 1),
            few.astype(np.int64),
        ),
        *(few.tolist(), [Image.fromarray(one[0]) for one in few], [one[0] for one in few]),
        [Image.fromarray(one[0]).convert("RGB") for one in few],
    ]
    for form in forms:
        np.testing.assert_allclose(opened.encode(form), expected, atol=1e-6)
    np.testing.assert_allclose(opened.encode(Image.fromarray(few[2, 0])), expected[2:3], atol=1e-6)
    np.testing.assert_allclose(opened.encode(few[2]), expected[2:3], atol=1e-6)
    assert opened.reconstruct(forms[0]).shape == (6, 8, 8, 1)
    assert opened.reconstruct(few).shape == (6, 1, 8, 8)
    assert [one.size for one in vaescale.pictures(opened.reconstruct(few))] == [(8, 8)] * 6


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: x.astype(np.float32), "are real numbers from 0 to 255, not in [0, 1]; give them as uint8"),
        (lambda x: x / 127.5 - 1, "are real numbers from -1 to 1, not in [0, 1]; scale them"),
        (lambda x: np.where(x > 250, np.nan, x / 255), "hold NaN or Inf"),
        (lambda x: (x > 128).astype(np.int64), "may be two of 256 levels or black and white"),
        (lambda x: x.astype(np.int64) * 2, "are whole numbers from 0 to 510"),
        (
            lambda x: x[:, :, :7],
            "have the shape [360, 1, 7, 8]; the model takes [N, 1, 8, 8] or [N, 8, 8, 1]",
        ),
        (lambda x: [x[0], x[1, :, :7]], "have different shapes ([1, 7, 8] and [1, 8, 8])"),
        (lambda _: [], "is an empty list"),
        (lambda _: "runs/digits", "are str of"),
        (lambda _: Image.new("RGB", (8, 8), "red"), "are in colour, and the model takes one channel"),
        (lambda _: Image.new("RGBA", (8, 8)), "are PIL images of mode RGBA"),
        (lambda _: Image.new("I;16", (8, 8)), "are PIL images of mode I;16"),
    ],
)
def test_images_with_two_meanings_or_none_are_refused(
    opened: Run, images: np.ndarray, form, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        opened.encode(form(images))
    assert message in str(caught.value)


def test_no_images_have_no_bounds(opened: Run, images: np.ndarray) -> None:
    for bounds in (opened.elbo(images[:0]), opened.log_prob(images[:0], draws=2)):
        assert bounds.shape == (0,)
        assert bounds.dtype == np.float64


def test_only_equal_axes_need_a_layout(digits: Path, tmp_path: Path) -> None:
    run = untrained("linear", digits, tmp_path)
    shape = (3, 3, 3)
    from vaescale.data.given_images import as_levels

    cube = np.arange(54, dtype=np.uint8).reshape(2, *shape)
    with pytest.raises(UserError, match="fit both orders of axes"):
        as_levels(cube, shape)
    np.testing.assert_array_equal(as_levels(cube, shape, layout="NHWC").images, cube.transpose(0, 3, 1, 2))
    with pytest.raises(UserError, match=r"layout \(='CHWN'\) must be 'NCHW' or 'NHWC'"):
        run.encode(cube, layout="CHWN")


@pytest.mark.parametrize(
    "name", ["predicted", "ladder", "fsq", "vq_vae", "vae_gan", "optimal_per_image", "bernoulli"]
)
def test_every_kind_of_run_works_or_says_why_not(name: str, digits: Path, tmp_path: Path) -> None:
    run = untrained(name, digits, tmp_path)
    model = run.trained.model
    if name == "vq_vae":
        model.quantizer.ready.fill_(1)  # a codebook that has started
    images = all_of(open_split(run.recipe, "val"))[:8]
    latents, means = run.encode(images), run.reconstruct(images)
    assert means.shape == images.shape
    np.testing.assert_allclose(run.decode(latents), means, atol=1e-5)
    assert run.sample(3, decode="ancestral").shape == (3, 1, 8, 8)
    has_bound = name not in ("vae_gan", "optimal_per_image")
    if has_bound:
        assert np.isfinite(run.elbo(images)).all()
    for call in [] if has_bound else [run.elbo, run.log_prob]:
        with pytest.raises(UserError, match="no bound on log p"):
            call(images)
    if model.num_codes:
        assert latents.dtype == np.int64
        for call, message in (
            (lambda: run.log_prob(images), "log_prob needs a Gaussian q"),
            (lambda: run.posterior(images), "posterior needs a Gaussian q"),
            (lambda: run.decode(latents + model.num_codes), f"whole numbers from 0 to {model.num_codes - 1}"),
            (lambda: run.sample(3, temperature=2.0), "no meaning for uniform codes"),
        ):
            with pytest.raises(UserError, match=message):
                call()
        return
    q = run.posterior(images)
    np.testing.assert_allclose(q.mean, latents.reshape(8, -1), atol=1e-5)
    if has_bound and name != "ladder":
        assert np.isfinite(run.log_prob(images, draws=3)).all()
    if name == "ladder":
        top = run.decode(latents[:, : model.group_sizes[0]], seed=1)
        assert top.shape == (8, 1, 8, 8)
        assert not np.allclose(top, run.decode(latents[:, : model.group_sizes[0]], seed=2)), (
            "lower groups are drawn"
        )


def test_latents_and_devices_that_do_not_fit_are_refused(opened: Run, trained_run: Path) -> None:
    for call, message in (
        (lambda: opened.decode(np.zeros((2, 5))), "z has 5 latents for each image; the model takes 4"),
        (lambda: opened.decode(np.zeros(4)), r"z has the shape \[4\]; give \[N, Z\]"),
        (lambda: opened.decode(np.full((2, 4), np.nan)), "z holds NaN"),
        (lambda: opened.decode(np.zeros((2, 4)), decode="median"), "--decode must be one of"),
        (lambda: opened.sample(0), r"count \(=0\) must be at least 1"),
        (lambda: opened.sample(2, components=3), "chooses a mixture; give prior='gmm'"),
        (lambda: opened.sample(2, prior="autoregressive"), "is over codes"),
        (lambda: load(trained_run, device="tpu"), r"device \(='tpu'\) cannot be used"),
        (lambda: load(trained_run, weights="best"), "weights"),
        (lambda: load(trained_run / "none"), "is not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device \(='cuda'\) cannot be used"):
            load(trained_run, device="cuda")


def test_a_mapping_is_trained_and_opened(
    recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"training.steps": 4, "training": {"precision": "bf16"}}
    run = train_recipe(
        recipe_content, **few, optimizer={"lr": np.float32(0.5)}, run_dir=Path(recipe_content["run_dir"])
    )
    assert (run.step, run.recipe.training.precision, run.recipe.optimizer.lr) == (4, "bf16", 0.5)
    longer = train_recipe(run.recipe, allow_changes=True, **{"training.steps": 6})
    assert longer.step == 6
    metrics = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1] == 6, "the same run went on"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trains on one process, and WORLD_SIZE is 2"):
        train_recipe(recipe_content)


def test_recipes_of_mappings_are_checked_like_files(recipe_content: dict[str, Any]) -> None:
    recipe = recipe_of({"base": "vaescale:digits/base", "name": "x", "likelihood": {"kind": "bernoulli"}})
    assert recipe.likelihood.kind == "bernoulli"
    assert recipe.run_dir == "runs/x"
    with pytest.raises(UserError, match=r"unknown key optimizer\.lrr \(=1\); did you mean optimizer\.lr\?"):
        recipe_of(recipe_content, {"optimizer.lrr": 1})
    with pytest.raises(UserError, match="network is 3"):
        recipe_of(recipe_content, {"network": 3})


def test_the_import_is_quick_and_knows_its_names() -> None:
    code = (
        "import sys, vaescale; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys(); vaescale.register; "
        "assert 'torch' not in sys.modules; missing = [n for n in vaescale.__all__ if not hasattr(vaescale, n)]; assert not missing"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    stub = (ROOT / "vaescale/__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub or f"\n{name} = " in stub for name in vaescale._LAZY), (
        "the stub for editors names them too"
    )
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = vaescale.lod
    assert math.isfinite(len(dir(vaescale)))
