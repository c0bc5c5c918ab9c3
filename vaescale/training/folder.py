"""A run folder: recipe.yaml, run.json, metrics.jsonl, summary.json, checkpoints/, figures/, and `lock` in training."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vaescale.errors import UserError

METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
TAGS = "run.json"


def append_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line to metrics.jsonl: step, time (seconds since 1970) and the metrics."""
    line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics})
    with (folder / METRICS).open("a") as file:
        file.write(line + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """One row a step in order; where a step was replayed after a resume, its last value of each metric."""
    path = folder / METRICS
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a line cut by a crash
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is absent."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def update_summary(folder: Path, section: str, content: Mapping[str, Any]) -> None:
    """Replace one section of summary.json."""
    write_json(folder / SUMMARY, {**read_json(folder / SUMMARY), section: dict(content)})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/lock` while training. Raises UserError when a living process holds it."""
    path = folder / "lock"
    own = {"host": socket.gethostname(), "pid": os.getpid()}
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        holder = read_json(path)
        if holder.get("host") != own["host"] or _alive(holder.get("pid")):
            raise UserError(
                f"process {holder.get('pid')} on {holder.get('host')} trains in {folder}; wait for it, choose another "
                f"run_dir, or delete {path} if that process is gone"
            ) from None
        descriptor = os.open(path, os.O_TRUNC | os.O_WRONLY)  # left by a process that was killed on this host
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(own))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _alive(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(pid)
