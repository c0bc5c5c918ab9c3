"""Images of 16 bits and of other numbers of channels, from `make-shards` to samples, scores and exports."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

import vaescale as package
from vaescale.commands.make_shards import make_shards
from vaescale.config import Window
from vaescale.data.making.sources.phantom import image
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.runs.folder import read_metrics

WINDOW = Window("int16", -1024, 3071)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few phantoms of 8x8, and spectra: uint16 of five channels."""
    folder = tmp_path_factory.mktemp("deep")
    make_shards("phantom", folder / "phantom", dtype="int16", size=8, resample="box", limit=48, jobs=1)
    values = np.random.Generator(np.random.Philox(1)).integers(0, 4096, (80, 8, 8, 5), np.uint16)
    for split, part in (("train", values[:64]), ("val", values[64:])):
        np.save(folder / f"{split}_images.npy", part)
        source, axes = f"arrays:{folder / f'{split}_images.npy'}", "image=images:NHWC"
        out = make_shards(source, folder / "spectra", dtype="uint16", column=axes, holdout=0, jobs=1)
        assert out[split]["values"]["dtype"] == "uint16"
    return folder


@pytest.fixture
def phantom(shards: Path, recipe_content: dict[str, Any]) -> dict[str, Any]:
    data = {"train": str(shards / "phantom/train"), "val": str(shards / "phantom/val"), "global_batch": 32}
    data |= {"dtype": "int16", "range": [-1024, 3071], "flip": True}
    return recipe_content | {"data": recipe_content["data"] | data, "figures": {"colours": "magma"}}


def test_a_phantom_is_a_function_of_its_number() -> None:
    assert np.array_equal(image("train", 7), image("train", 7))
    assert not np.array_equal(image("train", 7), image("val", 7))
    assert image("train", 7).dtype == np.int16
    assert -1024 <= image("train", 7).min() < -900
    assert 400 < image("train", 7).max() <= 3071


def test_a_run_of_16_bits_through_every_verb(
    vaescale: Any, shards: Path, phantom: dict[str, Any], recipe_file: Any, tmp_path: Path
) -> None:
    run = Path(phantom["run_dir"])
    trained = vaescale("train", recipe_file(phantom))
    assert trained.code == 0, trained.err
    evaluated = json.loads(vaescale("evaluate", run, "--json", "--importance-samples", "2").out)
    metrics = evaluated["metrics"]
    dimensions = 64 * math.log(2)
    assert metrics["bits_per_dim"] == pytest.approx(metrics["neg_elbo_nats"] / dimensions + 12)
    assert metrics["iwae_bits_per_dim"] == pytest.approx(metrics["neg_iwae_nats"] / dimensions + 12)
    assert (
        "+ 12: a density of 4096 levels (int16 from -1024 to 3071)" in evaluated["protocol"]["bits_per_dim"]
    )
    with Image.open(run / "figures/reconstructions.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.ptp(colours, axis=1) > 60).mean() > 0.05, "of the colour map"
    assert vaescale("quality", run, "--features", "pixels", "--count", "32").code == 0
    rows = json.loads(vaescale("baselines", run, "--json").out)["rows"]
    (pca,) = (row for name, row in rows.items() if name != "tiny")
    assert pca["bits_per_dim"] == pytest.approx(pca["nll_nats"] / dimensions + 12)
    samples = tmp_path / "samples"
    assert (
        vaescale(
            "sample", run, "--shards", samples, "--count", "8", "--prior", "standard", "--decode", "mean"
        ).code
        == 0
    )
    index = json.loads(next(samples.rglob("index.json")).read_text())
    assert index["values"]["dtype"] == "int16"
    assert -1024 <= index["values"]["low"] < index["values"]["high"] <= 3071
    scored = vaescale("score", run, shards / "phantom", "--out", tmp_path / "scores.csv", "--json")
    assert scored.code == 0, scored.err
    refused = vaescale("score", run, shards / "phantom", "--out", tmp_path / "a.csv", "--complexity", "png")
    refused.assert_refused(
        2, "--complexity compresses 8-bit images, and this run has int16 from -1024 to 3071"
    )

    opened = package.load(run, device="cpu")
    values = np.stack([image("val", n).reshape(8, 4, 8, 4).mean((1, 3)).round() for n in range(5)])
    stored = values.astype(np.int16)[..., None]
    reconstructed = opened.reconstruct(stored, layout="NHWC")
    assert opened.stored(reconstructed).dtype == np.int16
    for images, sentence in (
        (stored / 4096.0, "are real numbers from .*, and the model takes int16 from -1024 to 3071"),
        (stored.astype(np.int32) * 100, "values would be clipped"),
        (np.full(stored.shape, np.nan), "hold NaN or Inf"),
    ):
        with pytest.raises(UserError, match=sentence):
            opened.encode(images, layout="NHWC")

    assert vaescale("export", run, tmp_path / "model").code == 0
    assert "values of int16 from -1024 to 3071" in (tmp_path / "model/README.md").read_text()
    answer = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(stored)
    assert answer.dtype == np.int16
    np.testing.assert_array_equal(answer, opened.stored(reconstructed))
    assert vaescale("export", run, tmp_path / "graphs", "--format", "torch_export").code == 0
    encode = torch.export.load(tmp_path / "graphs/encode.pt2").module()
    decode = torch.export.load(tmp_path / "graphs/decode.pt2").module()
    (decoded, *_) = decode(encode(torch.from_numpy(stored.transpose(0, 3, 1, 2).copy()))[0])
    expected = -1024 + 4095 * torch.from_numpy(reconstructed).permute(0, 3, 1, 2)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0.5)
    described = json.loads((tmp_path / "graphs/vaescale.json").read_text())
    assert described["meanings"]["images"] == "stored values, int16 from -1024 to 3071"


@pytest.mark.parametrize(
    "likelihood",
    [{"kind": "discretized_logistic"}, {"kind": "bitwise"}],
    ids=["logistic", "bitwise"],
)
def test_five_channels_of_16_bits_and_a_resume_that_is_bit_equal(
    vaescale: Any,
    shards: Path,
    recipe_content: dict[str, Any],
    recipe_file: Any,
    tmp_path: Path,
    likelihood: dict[str, Any],
) -> None:
    data = {name: str(shards / "spectra" / name) for name in ("train", "val")}
    data |= {"channels": 5, "dtype": "uint16", "range": [0, 4095], "global_batch": 16, "flip": True}
    content = recipe_content | {"data": recipe_content["data"] | data, "likelihood": likelihood}
    content |= {"figures": {"channels": [5, 3, 1]}, "run_dir": str(tmp_path / "whole")}
    assert vaescale("train", recipe_file(content)).code == 0
    halves = shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(halves / "checkpoints/step-000000012")
    resumed = vaescale("train", recipe_file(content | {"run_dir": str(halves)}))
    assert resumed.code == 0, resumed.err
    last = [Path(tmp_path / name / "checkpoints/step-000000012") for name in ("whole", "halves")]
    names = [path.name for path in last[0].glob("*.safetensors")]
    assert names
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "halves")]
    curves = [
        {row["step"]: row["train/neg_elbo_nats"] for row in part if "train/neg_elbo_nats" in row}
        for part in rows
    ]
    assert curves[0] == curves[1]
    val = rows[0][-1]
    assert val["val/bits_per_dim"] == pytest.approx(val["val/neg_elbo_nats"] / (320 * math.log(2)))
    assert val["val/bits_per_dim"] > 11, "noise of 12 bits"
    assert vaescale("evaluate", tmp_path / "whole").code == 0


REFUSED = {
    "likelihood.kind=discretized_logistic_mixture data.channels=5": (2, "4 at most, and data.channels is 5"),
    "likelihood.kind=categorical": (2, "has a logit for each of 4,096 levels, 256 at most; take bitwise"),
    "data.range=[-1024,200]": (3, "are outside of data.range [-1024, 200]", "more than 0.1% of them; widen data.range"),
    "data.dtype=uint16 data.range=[0,4095]": (3, "holds int16 from", "data.dtype is uint16; set data.dtype=int16"),
    "likelihood.kind=bitwise data.range=[-1024,3000]": (2, "needs a power of two of levels, and data.range has 4,025; widen it to 4,096"),
    "likelihood.kind=bitwise data.dtype=float32 data.range=[0,1]": (2, "is a mass over levels, and data.dtype float32 has none"),
    "data.dtype=float32 data.range=[0,1] likelihood.dequantize=true": (2, "adds noise of one level, and data.dtype float32 has none"),
    "data.channels=3": (3, "holds 1 channels, data.channels is 3"),
    "figures.channels=[2]": (2, "figures.channels (=[2]) names channel 2, data.channels is 1"),
}  # fmt: skip


def test_a_starter_recipe_states_type_and_range(vaescale: Any, shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "starter.yaml"
    made = vaescale("new-recipe", shards / "phantom", "-o", path)
    assert made.code == 0, made.err
    data = load_recipe(path).data
    index = json.loads((shards / "phantom/train/index.json").read_text())["values"]
    assert data.window == ("int16", index["low"], index["high"])


@pytest.mark.parametrize("overrides", REFUSED)
def test_wrong_uses_are_refused_before_training(
    vaescale: Any, phantom: dict[str, Any], recipe_file: Any, overrides: str
) -> None:
    if "likelihood.kind" in overrides:
        phantom["likelihood"] = {}
    code, *sentences = REFUSED[overrides]
    vaescale("train", recipe_file(phantom), *overrides.split()).assert_refused(code, *sentences)
    assert not Path(phantom["run_dir"]).exists()
