"""`RUN/mlflow.json`: which MLflow run a folder has, what was sent of it, and which folder it is.

A folder that was moved keeps its MLflow run; a copy, whose original still exists, becomes a run of its own. Folder and run
know each other: the folder's random id is a tag of the run. The id changes with every move, so that of two copies on two
machines only the last one to move keeps the run.
"""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.runs.stores import SQLITE, absolute_uri, sqlite_path
from vaescale.system.console import say
from vaescale.system.secrets import redact

STATE = "mlflow.json"
FOLDER_ID = "vaescale.folder_id"  # a tag
STOPPED_CODES = (75, 130, 143)  # preempted, Ctrl-C, SIGTERM
KEPT_BY_A_COPY = ("project", "status", "ended_ms", "configured", "tracking_uri")

State = dict[str, Any]


def read(folder: Path) -> State:
    """The state of a run folder; {} before the first call of `begin`."""
    return run_folder.read_json(folder / STATE)


def record(folder: Path, state: State) -> None:
    """Record what was sent, so that a retry does not send it again."""
    run_folder.write_json(folder / STATE, state)


def begin(folder: Path, status: str | None, *, ended_ms: int | None = None) -> State:
    """Record where the folder is, and a new status of the run, before MLflow may be missing or the store may fail.

    status: None keeps the recorded one. ended_ms: when the run ended, by default now.
    """
    before = read(folder)
    state = {**located(folder, before)}
    if status is not None and status != state.get("status"):
        ended = None if status == "RUNNING" else ended_ms or int(time.time() * 1000)
        state |= {"status": status, "status_sent": False, "ended_ms": ended}
    if state != before:
        record(folder, state)
    return state


def located(folder: Path, state: State) -> State:
    """The state of a folder that may have been moved or copied since it was recorded. A copy has no MLflow run, and is reported."""
    here = os.path.abspath(folder)
    before = state.get("folder")
    if before is None:
        place = {"folder": here, "folder_id": uuid.uuid4().hex}
        return {**state, **place, "project": os.path.relpath(_first_project(state), here)}
    if before == here or (Path(before).is_dir() and Path(before).samefile(here)):
        return state
    place = {"folder": here, "folder_id": uuid.uuid4().hex}
    if not _is_of_the_same_run(Path(before), state):
        return {**state, **place, "previous_folder_id": state["folder_id"]}
    say(f"{folder} is a copy of {before}: in MLflow it becomes a run of its own")
    kept = {name: value for name, value in state.items() if name in KEPT_BY_A_COPY}
    copied = {"copied_from": state["run_id"]} if "run_id" in state else {}
    return {**kept, **place, **copied}


def _is_of_the_same_run(folder: Path, state: State) -> bool:
    """Whether another folder holds the run that this state is of."""
    other: State = {}
    with suppress(UserError, OSError):
        other = read(folder)
    return any(name in state and other.get(name) == state[name] for name in ("folder_id", "run_id"))


def _first_project(state: State) -> Path:
    """The folder that a run's relative paths are relative to; earlier versions recorded only the store's absolute path."""
    relative, recorded = sqlite_path(state.get("configured", "")), state.get("tracking_uri", "")
    if relative is not None and not relative.is_absolute() and recorded.endswith(f"/{relative}"):
        return Path(recorded.removeprefix(SQLITE).removesuffix(f"/{relative}"))
    return Path.cwd()


def store_uri(folder: Path, configured: str, state: State) -> str:
    """The absolute URI of a run's store.

    A relative SQLite path is relative to the run's project, the working folder of the first start, also after both were
    moved; if only the run folder was moved, the recorded path counts.
    """
    path = sqlite_path(configured)
    if path is None or path.is_absolute():
        return configured
    places = []
    if "project" in state:
        places.append(absolute_uri(configured, Path(os.path.abspath(folder)) / state["project"]))
    if state.get("configured") == redact(configured) and state.get("tracking_uri"):
        places.append(state["tracking_uri"])
    places.append(absolute_uri(configured))
    return next((uri for uri in places if (file := sqlite_path(uri)) and file.is_file()), places[0])


def final_status(folder: Path, steps: int) -> tuple[str | None, int | None]:
    """The status of a run, and when it ended (ms since 1970), as far as its folder tells. steps: the recipe's.

    None keeps the recorded status: of a run that trains now, that has ended in a known way, or that never began.
    """
    if run_folder.is_training(folder):
        return None, None
    rows = run_folder.read_metrics(folder)
    ended_ms = run_folder.last_trained_ms(folder)
    if run_folder.is_trained(folder, steps):
        return "FINISHED", ended_ms
    if read(folder).get("status", "RUNNING") != "RUNNING":
        return None, None
    stopped = run_folder.read_json(folder / run_folder.STOPPED)
    if stopped and stopped.get("exit_code") not in STOPPED_CODES:
        return "FAILED", ended_ms
    return ("KILLED", ended_ms) if stopped or rows else (None, None)
