"""The one way to save a verb's result: JSON in the run folder, rows of metrics.jsonl and summary.json, then MLflow."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vaescale.runs.folder import append_metrics, update_summary, write_json
from vaescale.runs.tracking import TrackingConfig, push

NOTHING: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


def save_result(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    *,
    step: int,
    metrics: Mapping[str, float],
    tracking: TrackingConfig,
    summary: Mapping[str, Mapping[str, Any]] = NOTHING,
    draw: Callable[[], object] | None = None,
    send: bool = True,
) -> None:
    """Save a result in a run folder and send the run's new metrics and files to MLflow.

    name: the JSON file within the folder, such as
    evaluation/val.json, which is written whole. metrics: by full name; NaN and Inf are left out. summary: the sections of
    summary.json to replace. draw: draws the result's pictures, after the result is written, which may have taken hours, and before both are
    sent. send: false for a caller that holds a lock, and calls `push` after its release.
    """
    write_json(folder / name, result)
    append_metrics(folder, step, {key: value for key, value in metrics.items() if math.isfinite(value)})
    for section, content in summary.items():
        update_summary(folder, section, content)
    if draw:
        draw()
    if send:
        push(folder, tracking)
