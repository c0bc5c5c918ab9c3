"""Checkpoints as logged models of MLflow; times, changes and rollbacks as MLflow shows them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow_state import final_status
from vaescale.runs.tracking import TrackingConfig, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves
BEST = [{"field_name": "metrics.val/neg_elbo_nats", "ascending": True}]


def checkpoint(run: Path, step: int) -> Path:
    """What the sender looks for."""
    folder = run / f"checkpoints/step-{step:09d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def best(state: dict[str, Any]) -> list[Any]:
    """The checkpoints of the experiment, the best first. By the absolute URI: MLflow keeps a store open by its name."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(state["tracking_uri"])
    try:
        ids = [state["experiment_id"]]
        return mlflow.search_logged_models(experiment_ids=ids, order_by=BEST, output_format="list")
    finally:
        mlflow.set_tracking_uri(before)


def metrics_of(model: Any) -> dict[str, float]:
    return {metric.key: metric.value for metric in model.metrics}


def test_the_best_checkpoint_is_a_question_that_mlflow_answers(
    project: Path, config: TrackingConfig, run: Path
) -> None:
    other = project / "runs/two"
    other.mkdir()
    (other / "recipe.yaml").write_text("name: two\n")
    checkpoint(run, 1)
    checkpoint(run, 2)
    last = checkpoint(other, 2)
    for folder, step, nats in ((run, 1, -10.0), (run, 2, -12.5), (other, 1, -99.0), (other, 2, -11.0)):
        run_folder.append_metrics(folder, step, {"val/neg_elbo_nats": nats, "val/mse": 0.1, "train/mse": 0.2})
    states = [sync(folder, config) for folder in (run, other)]
    models = best(states[0])
    assert [model.name for model in models] == ["one-step-2", "two-step-2", "one-step-1"]
    first = models[0]
    assert (first.source_run_id, first.params, first.model_type) == (
        states[0]["run_id"],
        {"step": "2"},
        "checkpoint",
    )
    assert metrics_of(first) == {"val/neg_elbo_nats": -12.5, "val/mse": 0.1}
    assert Path(models[1].tags["checkpoint"]) == last
    history = MlflowClient(states[0]["tracking_uri"]).get_metric_history(states[0]["run_id"], "val/mse")
    assert [point.step for point in history] == [1, 2], "the run's own curve has each point once"

    # Nothing changed; then a verb measures the checkpoint, a step is replayed, and one checkpoint is deleted.
    assert sync(run, config)["models"] == states[0]["models"]
    run_folder.append_metrics(run, 2, {"evaluation/val/neg_iwae_nats": -13.0})
    run_folder.append_metrics(run, 2, {"val/mse": 0.1, "train/mse": 0.2})
    (run / "checkpoints/step-000000001/manifest.json").unlink()
    sync(run, config)
    models = best(states[0])
    assert [model.name for model in models] == ["one-step-2", "two-step-2"]
    assert metrics_of(models[0])["evaluation/val/neg_iwae_nats"] == -13.0
    history = MlflowClient(states[0]["tracking_uri"]).get_metric_history(states[0]["run_id"], "val/mse")
    assert [point.step for point in history] == [1, 2]
    assert not list((project / "runs").rglob("MLmodel")), "nothing is copied"


def test_a_checkpoint_gets_its_metrics_when_they_come(run: Path, config: TrackingConfig) -> None:
    """It is saved before it is measured, or is still being written when the row is there."""
    checkpoint(run, 1)
    state = sync(run, config)
    run_folder.append_metrics(run, 1, {"val/mse": 0.5})
    run_folder.append_metrics(run, 2, {"val/mse": 0.25})
    sync(run, config)
    checkpoint(run, 2)
    sync(run, config)
    found = {model.name: metrics_of(model) for model in best(state)}
    assert found == {"one-step-1": {"val/mse": 0.5}, "one-step-2": {"val/mse": 0.25}}


def test_a_run_of_an_earlier_version_gets_its_models(run: Path, config: TrackingConfig) -> None:
    run_folder.append_metrics(run, 2, {"val/mse": 9.0})
    run_folder.append_metrics(run, 1, {run_folder.ROLLBACK: 0.5})
    run_folder.append_metrics(run, 2, {"val/mse": 0.25})
    state = sync(run, config)
    known = json.loads((run / "mlflow.json").read_text())
    del known["models"], known["held_out"]
    (run / "mlflow.json").write_text(json.dumps(known))
    checkpoint(run, 2)
    sync(run, config)
    assert [metrics_of(model) for model in best(state)] == [{"val/mse": 0.25}]


def test_a_server_without_logged_models_gets_the_rest(
    run: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(MlflowClient, "create_logged_model", refuse)
    checkpoint(run, 2)
    state = sync(run, config, status="FINISHED")
    assert state["status_sent"]
    assert state["models"] == {}


def test_a_change_of_the_recipe_is_shown_and_is_no_rollback(
    vaescale: Callable[..., Any], recipe_content: dict[str, Any], recipe_file, project: Path
) -> None:
    store = "sqlite:///runs/mlflow.db"
    content = recipe_content | {
        "run_dir": "runs/changed",
        "tracking": {"mlflow": store, "experiment": "tests"},
    }
    before = time.time()
    assert vaescale("train", recipe_file(content)).code == 0
    content["optimizer"]["lr"] = 1e-3
    content["training"]["steps"] = 18
    outcome = vaescale("train", recipe_file(content), "--allow-changes")
    assert outcome.code == 0, outcome.err
    folder = Path("runs/changed")
    state = json.loads((folder / "mlflow.json").read_text())
    stored = MlflowClient(state["tracking_uri"]).get_run(state["run_id"])
    tags = stored.data.tags
    assert (tags["current.optimizer.lr"], tags["current.training.steps"]) == ("0.001", "18")
    assert stored.data.params["optimizer.lr"] == "0.002", "params cannot change"
    assert "rollback" not in stored.data.metrics
    assert run_folder.CHANGED not in stored.data.metrics
    assert {row["step"] for row in run_folder.read_metrics(folder)} == {*range(1, 19)}
    started = run_folder.started(folder)
    assert before < started < run_folder.first_time(folder)
    assert stored.info.start_time == int(started * 1000), "of the first start"
    assert stored.info.end_time >= run_folder.last_trained_ms(folder)
    models = best(state)
    assert {model.name for model in models} == {"changed-step-12", "changed-step-18"}
    assert all("val/neg_elbo_nats" in metrics_of(model) for model in models)

    ended = run_folder.last_trained_ms(folder)
    run_folder.append_metrics(folder, 18, {"evaluation/val/mse": 1.0})
    (folder / "mlflow.json").unlink()
    assert final_status(folder, 18) == ("FINISHED", ended), "a verb's results are no training"
