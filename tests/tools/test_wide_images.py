"""Images that are no squares, from `make-shards` to samples and exports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaescale.config import size_of
from vaescale.data.config import DataConfig
from vaescale.recipe import Recipe


@pytest.fixture
def shards(vaescale: Any, tmp_path: Path) -> Path:
    """Digits of 12x24, from pictures of 8x8."""
    outcome = vaescale("make-shards", "digits", tmp_path / "data", "--size", "12x24", "--limit", "128")
    assert outcome.code == 0, outcome.err
    assert "are cut to the aspect of --size, which leaves out 50% of their pixels" in outcome.err
    return tmp_path / "data"


def test_a_run_of_wide_images(
    vaescale: Any, shards: Path, recipe_content: dict[str, Any], recipe_file: Any, tmp_path: Path
) -> None:
    made = json.loads((shards / "train/index.json").read_text())
    assert made["image"] == {"height": 12, "width": 24, "channels": 1}
    assert (made["made"]["size"], made["made"]["crop"]) == ([12, 24], "aspect")
    again = vaescale("make-shards", "digits", shards, "--size", "12x24", "--limit", "128")
    assert again.code == 0, again.err
    run = tmp_path / "wide"
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "image_size": [12, 24]}
    content = recipe_content | {"data": recipe_content["data"] | data, "run_dir": str(run)}
    assert vaescale("train", recipe_file(content)).code == 0
    assert "ssim" in vaescale("evaluate", run, "--json").out
    assert vaescale("fit-gmm", run, "--components", "1").code == 0
    folder = tmp_path / "samples"
    assert (
        vaescale("sample", run, "--shards", folder, "--count", "8", "--prior", "gmm", "--decode", "mean").code
        == 0
    )
    assert json.loads(next(folder.rglob("index.json")).read_text())["image"]["width"] == 24
    with Image.open(run / "figures/reconstructions.png") as picture:
        assert np.asarray(picture).std() > 0
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (40, 30), 128).save(photos / "one.png")
    assert vaescale("score", run, photos, "--out", tmp_path / "scores.csv").code == 0
    vaescale("score", run, photos, "--crop", "square").assert_refused(
        2, "--crop (=square) gives squares, the images are 12x24"
    )
    for index in (
        shards / "train/index.json",
        shards / "val/index.json",
    ):  # as if the shards held files as they are
        described = json.loads(index.read_text())
        del described["made"]["crop"], described["made"]["size"]
        index.write_text(json.dumps(described))
    scored = vaescale("score", run, photos, "--out", tmp_path / "again.csv", "--json")
    assert '"crop": "aspect"' in scored.out, scored.err
    refused = vaescale("train", recipe_file(content), "data.image_size=12", f"run_dir={tmp_path / 'square'}")
    refused.assert_refused(3, "holds 12x24 images, data.image_size is 12", "data.crop=square")


def test_a_square_has_one_side(recipe_content: dict[str, Any]) -> None:
    square = Recipe.model_validate(recipe_content)
    pair = Recipe.model_validate(recipe_content | {"data": recipe_content["data"] | {"image_size": [8, 8]}})
    assert pair.data.image_size == 8
    assert pair.hash == square.hash
    assert size_of(8, 6) == (8, 6)


@pytest.mark.parametrize("crop", ["square", 5])
def test_a_square_part_is_no_other_shape(crop: str | int) -> None:
    with pytest.raises(
        ValueError, match=r"crop \(=.*\) gives squares, image_size is \[8, 16\]; set crop to aspect or whole"
    ):
        DataConfig.model_validate(
            {"train": "a", "val": "b", "global_batch": 2, "image_size": [8, 16], "crop": crop}
        )
