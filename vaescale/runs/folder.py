"""A run folder: recipe.yaml, run.json, metrics.jsonl, summary.json, checkpoints/, figures/, and `lock` in training."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vaescale.errors import UserError
from vaescale.system.console import say
from vaescale.system.files import write_whole
from vaescale.system.secrets import redact

METRICS = "metrics.jsonl"
NON_FINITE = "non_finite.jsonl"
RECIPE = "recipe.yaml"
ROLLBACK = "rollback"  # a row with it: what was written of later steps before it does not count
STOPPED = "stopped.json"
SUMMARY = "summary.json"
TAGS = "run.json"


def append_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line to metrics.jsonl: step, time (seconds since 1970) and the metrics."""
    line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics})
    with (folder / METRICS).open("a") as file:
        file.write(line + "\n")


class NonFiniteSteps:
    """non_finite.jsonl: a line for each step whose loss or gradient was NaN or Inf, with the keys of its images.

    A resumed run replays steps: a line that the file has already is not written again.
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
            with self._path.open("a") as file:
                file.write(line + "\n")


def mend_metrics(folder: Path) -> None:
    """End a line of metrics.jsonl that a crash cut short."""
    _end_last_line(folder / METRICS)


def _end_last_line(path: Path) -> None:
    """Add a line break where a crash cut the last line short, so that the next line is whole."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def parse_metrics(text: str) -> Iterator[dict[str, float]]:
    """The rows of metrics.jsonl's text. A line that a crash cut short is passed over."""
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """One row a step in order; where a step was replayed after a resume, its last value of each metric."""
    path = folder / METRICS
    rows: dict[float, dict[str, float]] = {}
    for row in parse_metrics(path.read_text() if path.is_file() else ""):
        if ROLLBACK in row:
            rows = {step: kept for step, kept in rows.items() if step <= row["step"]}
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is absent. Raises UserError when it holds something else."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or delete it to do without") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; restore it, or delete it to do without")
    return content


def update_summary(folder: Path, section: str, content: Mapping[str, Any]) -> None:
    """Replace one section of summary.json."""
    write_json(folder / SUMMARY, {**read_json(folder / SUMMARY), section: dict(content)})


def forget_summary(folder: Path, *sections: str) -> None:
    """Remove sections of summary.json, if there are any."""
    before = read_json(folder / SUMMARY)
    if before.keys() & set(sections):
        write_json(folder / SUMMARY, {name: value for name, value in before.items() if name not in sections})


@contextmanager
def claimed(folder: Path, may_go_on: Callable[[], None]) -> Iterator[None]:
    """Hold a run folder while training. may_go_on raises UserError for another's, before anything is made."""
    may_go_on()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        may_go_on()  # another start may have come first
        yield


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Write to stopped.json why training ended, if it is not at its end: a launcher keeps the exit code to itself."""
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
        write_json(
            path, {"exit_code": code, "reason": redact(f"{type(error).__name__}: {error}".removesuffix(": "))}
        )
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/lock` while training. Raises UserError when another process holds it.

    The kernel holds the lock and lets go when the process ends, however it ends; the file's words are for people.
    """
    path = folder / "lock"
    with _locked_file(path) as file:
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **_job()}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked_file(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            raise UserError(
                f"another process trains in {path.parent} ({_in_words(holder)}); wait for it or choose another name or run_dir"
            ) from None
        except OSError as error:
            _refuse_living_holder(path, file, error)
            return file
        # The holder before may have deleted the file between our opening and our locking it.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()


def _refuse_living_holder(path: Path, file: IO[str], error: OSError) -> None:
    """Where the file system knows no locks, the words in the file decide: a process of this host that is gone, or no words,
    hold nothing. Raises UserError otherwise.
    """
    file.seek(0)
    words = file.read()
    try:
        holder = json.loads(words)
        host, pid = holder["host"], int(holder["pid"])
    except (ValueError, KeyError, TypeError):
        say(f"{path.parent} cannot be locked ({error.strerror}); take care that one job alone trains there")
        return
    if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
        say(f"taking over {path}: its process {pid} is gone")
        return
    file.close()
    raise UserError(
        f"{path.parent} cannot be locked ({error.strerror}), and {path} names {words}; wait for that job, or delete the "
        f"file if it is gone"
    )


def _in_words(holder: str) -> str:
    """`host vm, pid 25600`."""
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(holder).items())
    except (ValueError, AttributeError):
        return holder


def _job() -> dict[str, str]:
    """The cluster's name of this job, where it has one."""
    known = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_POD_NAME")
    found = [os.environ[name] for name in known if os.environ.get(name)]
    return {"job": found[0]} if found else {}
