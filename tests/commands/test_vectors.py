"""A run that is given vectors through the verbs: training, resuming, bounds, samples, graphs, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import vaescale as package
from tests.conftest import Outcome, run_verb, tiny_recipe
from vaescale.commands.served import Served
from vaescale.data.making.items import Item, members_of
from vaescale.data.making.storing import Making
from vaescale.data.making.vector_table import read_table
from vaescale.data.making.writing import write_shards
from vaescale.trained import open_split, open_trained

Verb = Callable[..., Outcome]
VECTORS = np.random.Generator(np.random.Philox(key=5)).normal(3, 2, size=(80, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, make_items: Callable[..., list[Item]]) -> Path:
    """A recipe with a condition of vectors, and its data beside it."""
    folder = tmp_path_factory.mktemp("vectors")
    for name, number in (("train", 80), ("val", 40)):
        items = [item._replace(members=members_of(VECTORS, n)) for n, item in enumerate(make_items(number))]
        write_shards(items, folder / name, Making())
    condition = {
        "kind": "vector",
        "size": 2,
        "member": "vector.npy",
        "width": 8,
        "dropout": 0.2,
        "prior": True,
    }
    content = {**tiny_recipe(folder, folder / "run"), "condition": condition}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    assert run_verb("train", recipe) == 0
    return recipe.parent / "run"


def test_a_resumed_run_has_the_same_bits(run: Path, recipe: Path, tmp_path: Path, vaescale: Verb) -> None:
    model = open_trained(run).model
    np.testing.assert_allclose(model.state_dict()["embedding.mean"].numpy(), VECTORS.mean(0), rtol=1e-5)
    resumed = shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/step-000000012")
    again = vaescale("train", recipe, f"run_dir={resumed}")
    assert again.code == 0
    assert f"next: vaescale evaluate {resumed}; vaescale sample {resumed}" in again.err
    files = [folder / "checkpoints/step-000000012/model.safetensors" for folder in (run, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bounds_are_given_the_vectors(run: Path, vaescale: Verb) -> None:
    result = vaescale("evaluate", run, "--json").json
    assert "given the vector of each image" in result["protocol"]["bound"]
    reader = open_split(open_trained(run).recipe, "val")
    fetched = reader.__getitems__(_all(reader))
    opened = package.load(run)
    assert fetched.vectors is not None
    bounds = opened.elbo(fetched.images.numpy(), vectors=fetched.vectors)
    assert -bounds.mean() == pytest.approx(result["metrics"]["neg_elbo_nats"], rel=1e-5)
    others = opened.elbo(fetched.images.numpy(), vectors=fetched.vectors.flip(0))
    assert not np.allclose(bounds, others)
    assert opened.elbo(fetched.images.numpy()).shape == bounds.shape, "hidden"


def _all(reader: Any) -> Any:
    from vaescale.data.batch import Request

    return Request(np.arange(len(reader)))


def test_samples_have_the_vectors_that_are_asked_for(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    words = (
        "sample",
        run,
        "--prior",
        "standard",
        "--decode",
        "mean",
        "--count",
        50,
        "--shards",
        tmp_path / "out",
    )
    assert vaescale(*words).code == 0
    reader = open_split(open_trained(run).recipe, "val", place=str(tmp_path / "out"))
    fetched = reader.__getitems__(_all(reader))
    assert fetched.vectors is not None
    assert np.array_equal(fetched.vectors.numpy(), np.tile(VECTORS[:40], (2, 1))[:50]), "of held-out images"
    np.save(tmp_path / "asked.npy", VECTORS[:2])
    opened = package.load(run)
    both, one = opened.sample(3, vector=tmp_path / "asked.npy"), opened.sample(3, vector=VECTORS[0])
    assert np.array_equal(both[[0, 2]], one[[0, 2]])
    assert not np.array_equal(both[1], one[1])
    text = ",".join(map(str, VECTORS[0].tolist()))
    drawn = vaescale("sample", run, "--between", "0,7", "--json").json
    assert Path(drawn["figure"]).name == "vector_interpolations.png"
    for options in (
        ("--vector", text, "--count", 4),
        ("--vector", "none", "--count", 4),
        ("--interpolate", "0,1"),
    ):
        assert vaescale("sample", run, *options).code == 0
    assert vaescale("encode", run).code == 0
    quality = ("quality", run, "--features", "pixels", "--decode", "mean", "--cache", tmp_path)
    assert vaescale(*quality).code == 0


def test_exports_take_vectors(run: Path, tmp_path: Path, vaescale: Verb) -> None:
    assert vaescale("export", run, tmp_path / "out", "--format", "torch_export").code == 0
    described = json.loads((tmp_path / "out/vaescale.json").read_text())
    assert described["graphs"]["encode"]["input"] == {"images": ["N", 1, 8, 8], "y": ["N", 2]}
    program = torch.export.load(tmp_path / "out/encode.pt2").module()
    images, y = torch.rand(3, 1, 8, 8), torch.from_numpy(VECTORS[:3])
    with torch.no_grad():
        expected = open_trained(run).model.given(y).posterior(images).mu
    torch.testing.assert_close(program(images, y)[0], expected, rtol=1e-4, atol=1e-5)
    rows = ";".join(",".join(map(str, row)) for row in VECTORS[:3].tolist())
    served = Served(run).predict(images.numpy(), {"mode": "encode", "vectors": rows})
    opened = package.load(run)
    np.testing.assert_allclose(served, opened.encode(images, vectors=VECTORS[:3]).reshape(3, -1), rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("score", "RUN", "DATA"), "score has no vector for each image"),
        (("latents", "RUN"), "latents has no vector for each image"),
        (("fit-gmm", "RUN", "--per-class"), "a mixture has no vector for each image"),
        (("sample", "RUN", "--class", "3"), "is given vectors of 2; give --vector"),
        (("sample", "RUN", "--vector", "1,2,3"), "takes 2 values each"),
        (("sample", "RUN", "--vector", "1,nan"), "hold NaN or infinite values"),
        (("sample", "RUN", "--vector", "big.npy"), "is no NumPy file of numbers"),
        (("sample", "RUN", "--between", "0,40"), "0 to 39"),
        (("sample", "RUN", "--map", "3"), "give --vector"),
        (("sample", "PLAIN", "--vector", "1,2"), "is given no vectors"),
        (("quality", "RUN", "--features", "pixels", "--per-class"), "needs a run that is given classes"),
    ],
)
def test_what_has_no_meaning_for_vectors_is_refused(
    run: Path, trained_run: Path, digits: Path, vaescale: Verb, words: tuple[object, ...], sentence: str
) -> None:
    meant = {"RUN": run, "PLAIN": trained_run, "DATA": digits / "val"}
    vaescale(*(meant.get(str(word), word) for word in words)).assert_refused(2, sentence)


def test_vectors_are_in_a_lossless_file(
    recipe: Path,
    digits: Path,
    make_items: Callable[..., list[Item]],
    tmp_path: Path,
    vaescale: Verb,
) -> None:
    pytest.importorskip("constriction")
    bitwise, out = tmp_path / "bitwise", tmp_path / "v.vsz"
    words = ("likelihood={kind: bitwise}", "training.steps=1", f"run_dir={bitwise}")
    assert run_verb("train", recipe, *words) == 0
    coded = vaescale("compress", bitwise, recipe.parent / "val", out, "--check", "--json").json
    result = vaescale("evaluate", bitwise, "--code-length", "--json").json
    assert coded["net_code_nats"] == pytest.approx(result["metrics"]["code_length_nats"], rel=0.01)
    back = vaescale("decompress", out, tmp_path / "out", "--run", bitwise, "--json").json
    assert (back["images"], back["damaged"]) == (40, {})
    table = read_table(tmp_path / "out" / "vectors.csv")
    assert np.array_equal(table.values, VECTORS[:40])
    assert all((tmp_path / "out" / f"{name}.png").is_file() for name in table.rows)
    words = ("compress", bitwise, "digits", tmp_path / "none.vsz", "--limit", 3)
    vaescale(*words).assert_refused(2, "these images have none")
    for name, size in (("some", 2), ("other", 3)):
        vectors = np.tile(VECTORS, (1, 2))[:5, :size].copy()
        vectors[0] = np.nan
        items = [item._replace(members=members_of(vectors, n)) for n, item in enumerate(make_items(5))]
        write_shards(items, tmp_path / name, Making())
    words = ("compress", bitwise, tmp_path / "other", tmp_path / "other.vsz")
    vaescale(*words).assert_refused(3, "4 have another size (3 values)")
    coded = vaescale("compress", bitwise, tmp_path / "some", tmp_path / "some.vsz")
    assert "1 of 5 images of" in coded.err
    assert vaescale("decompress", tmp_path / "some.vsz", tmp_path / "back", "--run", bitwise).code == 0
    words = ("--vectors", tmp_path / "back/vectors.csv", "--holdout", 0)
    again = vaescale("make-shards", f"folder:{tmp_path}/back", tmp_path / "again", *words)
    assert again.code == 0, again.err
    assert "1 of 5 images have no vector" in again.err


def test_images_without_vectors_are_said_where_they_were_hidden_in_training(
    run: Path, digits: Path, vaescale: Verb
) -> None:
    evaluated = vaescale("evaluate", run, "--data", digits / "val", "--images", 20)
    assert evaluated.code == 0
    assert "have no vector; the model is told none for them" in evaluated.err


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (("condition.size=3",), 3, "80 have another size (2 values)"),
        (("condition.member=angles.npy",), 3, "80 have none (a sample has cls, npy, vector.npy)"),
        (("condition.member=cls",), 2, "condition.member is 'cls'; write json:KEY"),
        (("condition.kind=angle",), 2, "condition.kind is 'angle'; known here: class, vector"),
        (("objective.kind=vae_gan",), 2, "needs a loss of a conditional model"),
    ],
)
def test_other_vectors_are_counted_before_training(
    recipe: Path, tmp_path: Path, vaescale: Verb, changes: tuple[str, ...], code: int, sentence: str
) -> None:
    outcome = vaescale("train", recipe, f"run_dir={tmp_path / 'run'}", *changes)
    outcome.assert_refused(code, sentence)
    assert not (tmp_path / "run").exists()
