"""A run folder: recipe.yaml, run.json, metrics.jsonl, summary.json, checkpoints/, figures/; `lock` during training."""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vaescale.errors import UserError
from vaescale.system.console import say
from vaescale.system.files import (
    LockHeldError,
    NoLocksError,
    acquire_lock,
    append_line,
    exclusive,
    release_lock,
    sign,
    strict_json,
    write_whole,
)
from vaescale.system.secrets import redact

METRICS = "metrics.jsonl"
NON_FINITE = "non_finite.jsonl"
RECIPE = "recipe.yaml"
ROLLBACK = "rollback"  # marks the row of a rollback: earlier rows of later steps do not count
CHANGED = "recipe_changed"  # in such a row: the recipe was changed on purpose, and nothing went wrong
STARTED = "started_seconds"  # in run.json, since 1970
STOPPED = "stopped.json"
STOPPED_EARLY = "stopped_early"  # key of the summary's section train
SUMMARY = "summary.json"
SUMMARY_WAIT_SECONDS = 60.0
TAGS = "run.json"


def refuse_other(folder: Path) -> None:
    """Raise UserError for what is not a run folder."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder (no {RECIPE}); give the run_dir of a training run")


def append_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line to metrics.jsonl: step, time (seconds since 1970) and the metrics that are numbers, not NaN or Inf."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    append_line(folder / METRICS, json.dumps({"step": step, "time": round(time.time(), 3), **finite}))


class NonFiniteSteps:
    """The file non_finite.jsonl: a line for each step whose loss or gradient was NaN or Inf, with the keys of its images.

    A resumed run replays steps; a line that the file already has is not written again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NON_FINITE
        self._known: set[int] | None = None  # hashes: a line names a whole batch

    def append(self, step: int, keys: list[str]) -> None:
        """Write a step's line, unless the file has it."""
        line = json.dumps({"step": step, "keys": keys})
        if self._known is None:
            _end_last_line(self._path)
            text = self._path.read_text() if self._path.is_file() else ""
            self._known = {hash(known) for known in text.splitlines()}
        if hash(line) not in self._known:
            self._known.add(hash(line))
            append_line(self._path, line)


def mend_metrics(folder: Path) -> None:
    """End a line of metrics.jsonl that a crash cut short."""
    _end_last_line(folder / METRICS)


def _end_last_line(path: Path) -> None:
    """Add a line break where a crash cut the last line short, so that the next line is whole."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def parse_metrics(text: str) -> Iterator[dict[str, float]]:
    """Yield the rows of metrics.jsonl's text. A line that a crash cut short is skipped."""
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def first_time(folder: Path) -> float | None:
    """When the first row of metrics.jsonl was written, in seconds since 1970; None without a row."""
    path = folder / METRICS
    if path.is_file():
        with path.open() as file:
            return next((row.get("time") for line in file for row in parse_metrics(line)), None)
    return None


def started(folder: Path) -> float | None:
    """When training first began, in seconds since 1970; of runs of earlier versions, when their first row was written."""
    return read_json(folder / TAGS).get(STARTED) or first_time(folder)


def last_trained_ms(folder: Path) -> int | None:
    """When training wrote its last row, in milliseconds since 1970; None without one. Results of verbs, which come later, do not count."""
    path = folder / METRICS
    times = [
        row["time"]
        for row in parse_metrics(path.read_text() if path.is_file() else "")
        if any(name.startswith(("train/", "val/")) for name in row)
    ]
    return int(times[-1] * 1000) if times else None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics, one row per step in order. Of a step that was replayed after a resume, the last values count."""
    path = folder / METRICS
    rows: dict[float, dict[str, float]] = {}
    for row in parse_metrics(path.read_text() if path.is_file() else ""):
        if ROLLBACK in row:
            rows = {step: kept for step, kept in rows.items() if step <= row["step"]}
        if CHANGED in row:
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    write_whole(path, (strict_json(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is absent. Raises UserError when it holds something else."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or delete it to do without") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; restore it, or delete it to do without")
    return content


def is_trained(folder: Path, steps: int) -> bool:
    """Whether a run was trained to its last step, the recipe's or that of early stopping, and summed up."""
    train = read_json(folder / SUMMARY).get("train", {})
    return bool(train.get("step") == steps or train.get(STOPPED_EARLY))


def update_summary(folder: Path, section: str, content: Mapping[str, Any]) -> None:
    """Replace one section of summary.json."""
    with _summary_locked(folder):
        write_json(folder / SUMMARY, {**read_json(folder / SUMMARY), section: dict(content)})


def forget_summary(folder: Path, *sections: str) -> None:
    """Remove sections of summary.json, if there are any."""
    with _summary_locked(folder):
        before = read_json(folder / SUMMARY)
        if before.keys() & set(sections):
            write_json(
                folder / SUMMARY, {name: value for name, value in before.items() if name not in sections}
            )


@contextmanager
def _summary_locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing summary.json between reading and writing it."""
    path = folder / f".{SUMMARY}.lock"
    try:
        with exclusive(path, wait_seconds=SUMMARY_WAIT_SECONDS, waiting=f"waiting for {path}"):
            yield
    except LockHeldError as error:
        raise UserError(
            f"{path} has been held for {SUMMARY_WAIT_SECONDS:.0f} s ({error.holder}); end that process and try again"
        ) from None


@contextmanager
def claimed(folder: Path, may_go_on: Callable[[], None]) -> Iterator[None]:
    """Hold a run folder while training. may_go_on: raises UserError for another run's folder, before it is changed."""
    may_go_on()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        may_go_on()  # another start may have come first
        yield


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Write to stopped.json why training stopped early: a launcher does not pass on the exit code."""
    path = folder / STOPPED
    path.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        code = (
            error.exit_code
            if isinstance(error, UserError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        )
        write_stopped(folder, code, f"{type(error).__name__}: {error}".removesuffix(": "))
        raise


def write_stopped(folder: Path, exit_code: int, reason: str) -> None:
    """Write stopped.json: the exit code and the reason of an early end, and its time in seconds since 1970."""
    content = {"exit_code": exit_code, "reason": redact(reason), "time": round(time.time(), 3)}
    write_json(folder / STOPPED, content)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/lock` while training. Raises UserError when another process holds it.

    The kernel holds the lock and releases it when the process ends, however it ends; the file's content is for people.
    """
    path = folder / "lock"
    file = _locked_file(path)
    try:
        yield
    finally:
        release_lock(path, file)


def is_training(folder: Path) -> bool:
    """Whether a process trains in a run folder. Where the file system has no locks, a process that may live counts."""
    path = folder / "lock"
    if not path.is_file():
        return False
    try:
        release_lock(path, acquire_lock(path))
    except LockHeldError:
        return True
    except NoLocksError as error:
        return _may_live(error.content)
    return False


def _locked_file(path: Path) -> BinaryIO:
    try:
        return acquire_lock(path)
    except LockHeldError as error:
        raise UserError(
            f"another process trains in {path.parent} ({error.holder}); wait for it or choose another name or run_dir"
        ) from None
    except NoLocksError as error:
        _refuse_living_holder(path, error)
        file = path.open("ab+", buffering=0)
        sign(file)
        return file


def _refuse_living_holder(path: Path, error: NoLocksError) -> None:
    """Raise UserError where the file system has no locks and the lock file names a process that may be alive.

    A process of this host that has ended does not count, and neither does a file that names no process.
    """
    try:
        pid = _holder(error.content)[1]
    except (ValueError, KeyError, TypeError):
        say(f"{path.parent} cannot be locked ({error.reason}); make sure that only one job trains there")
        return
    if not _may_live(error.content):
        say(f"taking over {path}: its process {pid} is gone")
        return
    raise UserError(
        f"{path.parent} cannot be locked ({error.reason}), and {path} names {error.content}; wait for that job, or delete the "
        f"file if it has ended"
    )


def _holder(content: str) -> tuple[str, int]:
    """The host and process that a lock file names."""
    holder = json.loads(content)
    return holder["host"], int(holder["pid"])


def _may_live(content: str) -> bool:
    """Whether the process that a lock file names may be alive: on this host it is looked up. False if it names none."""
    try:
        host, pid = _holder(content)
    except (ValueError, KeyError, TypeError):
        return False
    return host != socket.gethostname() or Path(f"/proc/{pid}").exists()
