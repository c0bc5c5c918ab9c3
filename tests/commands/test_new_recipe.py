"""Starter recipes, epochs in place of steps, and norms for each value of an image."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vaescale.commands.new_recipe import new_recipe, suggest
from vaescale.config import sides
from vaescale.data.index import Shard, ShardIndex, ShardTable
from vaescale.data.making.items import Clip, Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.errors import UserError
from vaescale.recipe import load_recipe, recipe_of

FEW = ("training.epochs=null", "training.steps=3", "tracking.mlflow=null")


def test_the_digits_get_a_recipe_that_trains(vaescale, digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = vaescale("new-recipe", digits, "--name", "mine", "--json").json
    assert (made["image_size"], made["channels"], made["widths"], made["steps"]) == (8, 1, [64, 128], 1100)
    recipe = load_recipe(Path("mine.yaml"))
    assert (recipe.training.epochs, recipe.training.steps, recipe.optimizer.clip_norm) == (100, 1100, 640)
    assert recipe.data.cache == "memory"
    outcome = vaescale("train", "mine.yaml", *FEW)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs/mine/summary.json").is_file()
    vaescale("new-recipe", digits, "--name", "mine").assert_refused(2, "mine.yaml already exists")
    vaescale("new-recipe", digits / "train", "-o", "x.yaml").assert_refused(
        3, "is one split; give the folder", str(digits)
    )
    vaescale("new-recipe", tmp_path, "-o", "x.yaml").assert_refused(3, "does not exist")
    assert not Path("x.yaml").exists()


@pytest.mark.parametrize(
    ("shape", "crop", "size", "folder"),
    [
        ((64, 64, 3), None, 64, "photos"),
        ((40, 56, 3), None, (40, 56), "wide"),
        ((37, 56, 3), "square", 32, "my photos: 2024"),
    ],
)
def test_colour_images_get_a_recipe_that_trains(
    vaescale,
    make_items: Callable[..., list[Item]],
    tmp_path: Path,
    monkeypatch,
    shape: tuple[int, int, int],
    crop: str | None,
    size: int | tuple[int, int],
    folder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(make_items(24, shape=shape), tmp_path / folder / "train", Making())
    write_shards(make_items(8, shape=shape, seed=1), tmp_path / folder / "test", Making())
    made = new_recipe(folder)
    widths = [32, 64, 128, 256][: 4 if size == 64 else 3]
    assert (made["image_size"], made["widths"], made["global_batch"]) == (size, widths, 16)
    path = Path(made["recipe"])
    recipe = load_recipe(path)
    assert (recipe.data.val, recipe.data.crop) == (f"{folder}/test", crop)
    assert recipe.optimizer.clip_norm == 10 * 3 * math.prod(sides(size))
    narrow = (f"network.widths={[8] * len(widths)}", "data.workers=0")
    plan = vaescale("train", path, *FEW, *narrow, "--dry-run", "--time-steps", "--json").json["plan"]
    assert 0 < plan["seconds_per_step"] < 60
    assert plan["training_seconds"] == pytest.approx(3 * plan["seconds_per_step"])
    assert not Path("runs").exists()
    assert vaescale("train", path, *FEW, *narrow).code == 0


def test_without_held_out_images_the_remedy_is_said(
    make_items: Callable[..., list[Item]], tmp_path: Path
) -> None:
    write_shards(make_items(20), tmp_path / "few/train", Making())
    with pytest.raises(UserError, match=r"has neither val nor test to evaluate on .* --holdout 0.05"):
        new_recipe(str(tmp_path / "few"), out=tmp_path / "few.yaml")


@pytest.mark.parametrize(
    ("image", "images", "expected"),
    [
        ((28, 28, 1), 60_000, (28, None, (64, 128), 32, 128, 6)),
        ((32, 32, 3), 50_000, (32, None, (32, 64, 128), 128, 128, 8)),
        ((218, 178, 3), 162_770, (64, "square", (32, 64, 128, 256), 64, 128, 2)),
        ((128, 128, 3), 2_000_000, (128, None, (32, 64, 128, 256, 256), 64, 128, 1)),
        ((75, 75, 3), 500, (64, "square", (32, 64, 128, 256), 64, 32, 100)),
        (None, 9, (64, "square", (32, 64, 128, 256), 64, 9, 100)),
    ],
)
def test_sizes_follow_from_the_index(image: Any, images: int, expected: tuple[Any, ...]) -> None:
    shard = Shard("a.tar", 1, "0" * 64, images, 1, "0" * 64)
    found = suggest(ShardIndex("data", ShardTable.of([shard]), image, (), {}))
    assert (
        found.image_size,
        found.crop,
        found.widths,
        found.latent_dim,
        found.global_batch,
        found.epochs,
    ) == expected
    assert found.image_size % 2 ** len(found.widths) == 0


def test_epochs_are_steps_of_the_index(vaescale, recipe_content: dict[str, Any], recipe_file) -> None:
    content = {**recipe_content, "training": {**recipe_content["training"], "epochs": 0.5}}
    del content["training"]["steps"]
    recipe = recipe_of(content)
    assert recipe.training.steps == 11, "half of 22 steps of 64 in 1,437 images"
    sets = [
        {"path": recipe_content["data"]["train"]},
        recipe_content["data"]["val"],
        {"path": "nowhere", "weight": 0},
    ]
    for train, steps in ((sets[:2], 14), ([{**sets[0], "weight": 1}, sets[2]], 11)):
        assert recipe_of(content, {"data.train": train}).training.steps == steps, (
            "1,797 images; the last set is not read"
        )
    same = {**recipe_content, "training": {**recipe_content["training"], "steps": 11}}
    assert recipe.hash == recipe_of(same).hash, "steps decide the numbers"
    outcome = vaescale("train", recipe_file(content))
    assert outcome.code == 0, outcome.err
    assert "training.epochs (=0.5) is 11 steps, 22 an epoch" in outcome.err
    saved = yaml.safe_load((Path(content["run_dir"]) / "recipe.yaml").read_text())["training"]
    assert (saved["epochs"], saved["steps"]) == (0.5, 11)
    assert vaescale("train", recipe_file(same)).code == 0, "it is the same run"
    both = recipe_file({**same, "training": {**content["training"], "steps": 12}})
    vaescale("train", both, "--dry-run").assert_refused(
        2,
        "training.epochs (=0.5) is 11 steps of these images, and training.steps is 12; set one of them to null",
    )
    for override, words in (
        ("training.epochs=-1", "training.epochs is -1"),
        ("training.epochs=many", "training.epochs is 'many'"),
        ("training.epochs=null", "training.steps is missing"),
    ):
        vaescale("train", recipe_file(content), override, "--dry-run").assert_refused(2, words)
    vaescale("train", recipe_file(content), "data.train=nowhere", "--dry-run").assert_refused(
        3, "nowhere does not exist"
    )


def test_norms_for_each_value_are_those_of_the_image(recipe_content: dict[str, Any]) -> None:
    def with_optimizer(**keys: float | None) -> Any:
        return recipe_of(recipe_content, {"optimizer": keys})

    factors = with_optimizer(clip_norm_per_dimension=3.125, skip_norm_per_dimension=10)
    assert (factors.optimizer.clip_norm, factors.optimizer.skip_norm) == (200, 640)
    plain = with_optimizer(clip_norm=200, skip_norm=640)
    assert factors.hash == plain.hash
    assert factors.settings() == plain.settings()
    assert recipe_of(factors.model_dump(mode="json")) == factors, "a saved recipe has both"
    with pytest.raises(
        UserError,
        match=r"^optimizer\.clip_norm \(=5\) is not optimizer\.clip_norm_per_dimension \(=2\) times D \(=64\), 128; set one of them to null",
    ):
        with_optimizer(clip_norm=5, clip_norm_per_dimension=2)


def test_a_plan_names_a_ladder_s_stages_and_one_unit(
    vaescale, recipe_content: dict[str, Any], recipe_file
) -> None:
    ladder = {"network": {"kind": "ladder", "latent_dim": 2, "width": 8}, "posterior": {"kind": "relative"}}
    recipe = recipe_file(recipe_content | ladder)
    printed = vaescale("train", recipe, "--dry-run").out
    assert "ladder_encoder               8x2,8d2,4x2,4d4,1x1\n" in printed
    assert "ladder_decoder               1x1,4m1,4x2,8m4,8x2\n" in printed
    assert "_bytes" not in printed.partition("\nplan")[2]
    vaescale("train", recipe, "--time-steps").assert_refused(2, "--time-steps is for --dry-run")


def test_sequences_get_a_recipe_that_trains(vaescale, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = np.arange(9 * 16 * 24 * 3, dtype=np.int64).reshape(9, 16, 24, 3).astype(np.uint8)
    for split, lengths in (("train", (9, 6, 7, 8)), ("val", (6, 6))):
        clips = [Item(f"{n}", Clip(tuple(frames[:length])), -1) for n, length in enumerate(lengths)]
        write_shards(clips, tmp_path / "clips" / split, Making(), made={"kind": "sequences"})
    made = vaescale("new-recipe", "clips", "--json").json
    chosen = {
        key: made[key] for key in ("image_size", "channels", "frames", "context", "widths", "global_batch")
    }
    assert chosen == {
        "image_size": [16, 24],
        "channels": 3,
        "frames": 6,
        "context": 2,
        "widths": [16, 32],
        "global_batch": 2,
    }
    outcome = vaescale(
        "train", "clips.yaml", "training.epochs=null", "training.steps=1", "tracking.mlflow=null"
    )
    assert outcome.code == 0, outcome.err
    write_shards(
        [Item("a", Clip(tuple(frames[:3, :7, :9])), -1)],
        tmp_path / "odd" / "train",
        made={"kind": "sequences"},
    )
    (tmp_path / "odd" / "val").symlink_to(tmp_path / "clips" / "val")
    vaescale("new-recipe", "odd").assert_refused(3, "frames of 7x9 pixels", "--size 64")
