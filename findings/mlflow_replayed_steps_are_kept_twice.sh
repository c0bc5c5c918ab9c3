#!/usr/bin/env bash
# mlflow 3.17.2, its default store
# Expected: a run that is resumed from a checkpoint and logs steps 2 and 3 again replaces their values.
# Seen: the history has two values for each of these steps; the chart goes back in time.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2
export MLFLOW_DISABLE_TELEMETRY=true

venv/bin/python - <<'PYTHON'
import mlflow

mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run() as run:
    for step in range(4):
        mlflow.log_metric("loss", 10.0 - step, step=step)
with mlflow.start_run(run_id=run.info.run_id):  # resumed from the checkpoint of step 2
    for step in range(2, 6):
        mlflow.log_metric("loss", 10.5 - step, step=step)
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
steps = sorted(entry.step for entry in history)
print("steps in the history:", steps)
assert steps == [0, 1, 2, 2, 3, 3, 4, 5], "the behaviour changed"
PYTHON
