#!/usr/bin/env bash
# mlflow 3.17.2, its default store
# Expected: a loss of infinity is read back as infinity, or refused.
# Seen: it is read back as the largest float64, 1.8e308, which passes a check for finite values. NaN is kept.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2
export MLFLOW_DISABLE_TELEMETRY=true

venv/bin/python - <<'PYTHON'
import math

import mlflow

mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run() as run:
    mlflow.log_metrics({"loss": math.inf, "other": math.nan}, step=0)
metrics = mlflow.get_run(run.info.run_id).data.metrics
print("logged inf and nan, read", metrics)
assert math.isnan(metrics["other"])
assert math.isfinite(metrics["loss"]) and metrics["loss"] > 1e308, "the behaviour changed"
PYTHON
