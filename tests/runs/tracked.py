"""Run folders and the store that tests send them to."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient


def make_run(folder: Path) -> Path:
    """A run folder with two rows, a second apart."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\n")
    rows = [{"step": step, "time": 1e9 + step, "train/mse": 1 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def client_at(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")


def steps_sent(client: MlflowClient, state: dict[str, Any]) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(state["run_id"], "train/mse"))


def place_artifacts(client: MlflowClient, place: str, name: str = "tests") -> None:
    client.create_experiment(name, artifact_location=place)
