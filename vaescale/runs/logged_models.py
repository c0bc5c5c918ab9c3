"""Checkpoints in MLflow as logged models: one for each checkpoint that the run folder holds, with the held-out metrics of its step.

"The best checkpoint over all runs" is then a question to MLflow:

    mlflow.search_logged_models(experiment_ids=[ID], order_by=[{"field_name": "metrics.val/neg_elbo_nats", "ascending": True}])

The models are external: MLflow gets step, place and metrics, and no file. The model of a deleted checkpoint is deleted.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow_state import State

CHECKPOINT = re.compile(r"step-(\d{9})")
HELD_OUT = ("val/", "evaluation/val/")
NEWEST = 5  # steps whose metrics are kept for a checkpoint that is not yet written
TYPE, EXTERNAL = "checkpoint", "mlflow.model.isExternal"
MISSING = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")  # a server of MLflow 2


def note(state: State, row: Mapping[str, float]) -> None:
    """Keep the held-out metrics of a row of metrics.jsonl in the state of mlflow.json: [value, ms since 1970] by step and name.

    Of a step that training replays, the first values count, which the MLflow run has; a rollback drops those of later steps.
    """
    kept = state.setdefault("held_out", {})
    step = int(row["step"])
    if run_folder.ROLLBACK in row:
        for later in [one for one in kept if int(one) > step]:
            del kept[later]
    values = {name: [row[name], int(row["time"] * 1000)] for name in row if name.startswith(HELD_OUT)}
    if values:
        found = kept.setdefault(str(step), {})
        found |= {
            name: value for name, value in values.items() if name not in found or not name.startswith("val/")
        }


def send(client: Any, run: Any, folder: Path, state: State, record: Callable[[], None]) -> int:
    """Add, complete and delete logged models until they are those of the folder's checkpoints. Returns the number of requests' subjects."""
    from mlflow.exceptions import MlflowException

    there = {str(step) for step in _steps(folder)}
    models, held_out = state.setdefault("models", {}), state.setdefault("held_out", {})
    newest = sorted(held_out, key=int)[-NEWEST:]
    for step in [one for one in held_out if one not in there and one not in newest]:
        del held_out[step]
    changed = 0
    try:
        for step in sorted(there - models.keys(), key=int):
            models[step] = {"id": _create(client, run, folder, step), "metrics": {}}
            record()
            changed += 1
        for step in sorted(models.keys() - there, key=int):
            _delete(client, models[step]["id"])
            del models[step]
            record()
            changed += 1
        for step, model in models.items():
            known = model["metrics"]
            fresh = {
                name: found for name, found in held_out.get(step, {}).items() if known.get(name) != found
            }
            if fresh:
                _log(client, run.info.run_id, step, model["id"], fresh)
                model["metrics"] = known | fresh
                record()
                changed += 1
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
    return changed


def _steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints. Imports no torch, as `checkpoint` does."""
    paths = (folder / "checkpoints").glob("step-*/manifest.json")
    found = (CHECKPOINT.fullmatch(path.parent.name) for path in paths)
    return sorted(int(match[1]) for match in found if match)


def _create(client: Any, run: Any, folder: Path, step: str) -> str:
    from mlflow.entities import LoggedModelStatus

    name = re.sub(r"[^\w-]", "-", f"{run.info.run_name}-step-{step}")
    place = folder.absolute() / "checkpoints" / f"step-{int(step):09d}"
    model = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run.info.run_id,
        tags={EXTERNAL: "true", "checkpoint": str(place)},
        params={"step": step},
        model_type=TYPE,
    )
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def _delete(client: Any, model_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # somebody deleted it
            raise


def _log(client: Any, run_id: str, step: str, model_id: str, found: Mapping[str, list[Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(re.sub(r"[^\w. :/-]", "_", name), value, ms, int(step), model_id=model_id, run_id=run_id)
        for name, (value, ms) in found.items()
    ]
    client.log_batch(run_id, metrics=metrics)
