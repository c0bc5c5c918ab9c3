"""Training with a perceptual term: what is logged, what a checkpoint holds, and when the features change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vaescale.perceptual import classifier
from vaescale.perceptual.classifier import Classifier, Shape


def save_features(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    shape = Shape(channels=1, size=8, classes=10, width=4)
    classifier.save(Classifier(shape), shape, folder, {})


def test_a_run_with_a_perceptual_term(
    recipe_content: dict[str, Any],
    recipe_file: Callable[[dict[str, Any]], str],
    vaescale: Callable[..., Any],
    tmp_path: Path,
) -> None:
    features = tmp_path / "features"
    features.mkdir()
    save_features(features, seed=0)
    recipe_content["objective"] = {"perceptual": {"features": str(features), "weight": 5.0, "start_step": 2}}
    path, run = recipe_file(recipe_content), Path(recipe_content["run_dir"])
    assert vaescale("train", path).code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in rows if "train/loss_nats" in row}
    assert "train/perceptual" not in by_step[2]
    assert by_step[3]["train/perceptual"] > by_step[12]["train/perceptual"] > 0
    row = by_step[12]
    loss = row["train/neg_elbo_nats"] + 5.0 * row["train/perceptual"]
    assert abs(row["train/loss_nats"] - loss) < 1e-3 * abs(loss)
    (newest,) = sorted((run / "checkpoints").glob("*12"))
    for file in newest.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if "stem" in name or "convolutions" in name]  # noqa: SIM118
    assert json.loads((run / "run.json").read_text())["perceptual_hash"]
    assert vaescale("evaluate", run).code == 0, "it needs no features"

    save_features(features, seed=1)
    changed = vaescale("train", path)
    assert changed.code == 3
    assert "perceptual_hash" in changed.err
