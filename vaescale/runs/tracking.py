"""Tracking in MLflow from the run folder: metrics.jsonl is written first, and sent in the background.

A run can therefore train while the tracking server is away. What was not sent stays in the folder; `vaescale sync RUN`
sends the rest. `RUN/mlflow.json` records the MLflow run and what was sent after each request, so nothing is sent twice. It
holds only the run's status until the store has answered for the first time.
One thread of one process sends a run at a time, under the lock `RUN/.mlflow.lock`.
"""

import getpass
import hashlib
import json
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field, field_validator

from vaescale.config import Config, flat
from vaescale.errors import MissingPackage, Preempted, UserError
from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow import SQLITE, absolute_uri, be_patient, experiment_id, is_installed, quiet
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive
from vaescale.system.secrets import is_redacted, redact

STATE = "mlflow.json"
LOCK = ".mlflow.lock"
WAIT_SECONDS = 60.0  # for another sender of the same run
STORES = (SQLITE, "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
BATCH_METRICS = 1000  # MLflow's limits for one request
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
DIGEST_CHARACTERS = 36
REPLAYED = ("train/", "val/", "perf/", "data/", "system/")
ARTIFACTS = (
    "recipe.yaml",
    "summary.json",
    "figures/*.png",
    "figures/progress/*.png",
    "evaluation/*.json",
    "gmm/*.*",
    "gmm/components-*/*",
)


class TrackingConfig(Config):
    """The MLflow store in which runs are compared."""

    mlflow: str | None = Field(
        default="sqlite:///runs/mlflow.db", description="URI of the MLflow store; null: none"
    )

    @field_validator("mlflow")
    @classmethod
    def _is_a_store(cls, uri: str | None) -> str | None:
        if uri is not None and not uri.startswith(STORES):
            raise ValueError(f"an MLflow store begins with one of {', '.join(STORES)}; null means none")
        return uri

    experiment: str = Field(default="vaescale", description="name of the MLflow experiment")
    parent: str | None = Field(default=None, description="id of the parent run in MLflow; a sweep sets it")


_unanswered: dict[Path, threading.Thread] = {}  # by run folder: the drain that still waits for its store


class OtherSender(UserError):
    """Another process or thread sends the same run to MLflow, for longer than the wait."""


class Drain:
    """A thread that sends a run folder to MLflow, every few seconds and at the end: `with Drain(folder, config):`.

    It never raises and never makes a step wait. While another process sends this run, it tries again in the next round; only
    the last round waits, for `patience` seconds. shown: true on the first process, the only one that sends.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        shown: bool,
        every_seconds: float = 5.0,
        patience: float = 60.0,
    ) -> None:
        self._folder, self._config, self._every, self._patience = folder, config, every_seconds, patience
        self._active = shown and config.mlflow is not None
        self._stop = threading.Event()
        self._status: str | None = "RUNNING"
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")

    def __enter__(self) -> "Drain":
        if self._active:
            if not is_installed():
                say(
                    f"MLflow is not installed, and tracking.mlflow is {self._config.mlflow}: the rows stay in {self._folder}. To "
                    f"send them: pip install mlflow, then `vaescale sync {self._folder}`; tracking.mlflow=null for no store"
                )
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._active:
            return
        stopped = kind is not None and (issubclass(kind, Preempted) or not issubclass(kind, Exception))
        self._status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self._stop.set()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            _unanswered[self._folder.absolute()] = self._thread
        said = isinstance(self._fault, MissingPackage)  # by __enter__
        if self._thread.is_alive() or (self._fault is not None and not said):
            reason = self._fault or f"no answer in {self._patience:.0f} s"
            _say_behind(self._folder, self._config, reason)

    def _work(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(self._every)
            try:
                wait_seconds = self._patience if last else 0.0
                sync(self._folder, self._config, status=self._status, wait_seconds=wait_seconds)
                self._fault = None
            except Exception as error:  # whatever a server or a network may raise; the run continues
                self._fault = error


def sync(
    folder: Path, config: TrackingConfig, *, status: str | None = None, wait_seconds: float = WAIT_SECONDS
) -> dict[str, Any]:
    """Send what MLflow does not have yet: tags, params, metrics, artifacts.

    Returns the new content of mlflow.json, with metrics_sent and artifacts_sent, the numbers sent by this call. status: the
    run's, when it changes; remembered until it is sent. wait_seconds: how long to wait while another process or thread sends
    this run. Raises OtherSender after that, and whatever MLflow raises when the store does not answer.
    """
    assert config.mlflow is not None
    if is_redacted(config.mlflow):
        raise UserError(
            f"tracking.mlflow ({config.mlflow}) had credentials, which run folders do not keep; name the store without them "
            f"in {folder / run_folder.RECIPE} and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    be_patient()
    waiting = f"waiting for another process that sends {folder} to MLflow"
    try:
        with exclusive(folder / LOCK, wait_seconds=wait_seconds, waiting=waiting):
            _record_status(folder, status)
            with quiet():
                return _send(folder, config, status)
    except LockHeldError as error:
        raise OtherSender(
            f"another process sends {folder} to MLflow ({error.holder}); when it has ended: `vaescale sync {folder}`"
        ) from None


def _send(folder: Path, config: TrackingConfig, status: str | None) -> dict[str, Any]:
    """Send what MLflow does not have yet, while holding the lock (see `sync`)."""
    from mlflow import MlflowClient

    state = run_folder.read_json(folder / STATE)
    public = redact(config.mlflow or "")
    # A relative SQLite path is remembered as an absolute one; one with credentials is known to this process alone.
    uri = config.mlflow if public != config.mlflow else state.get("tracking_uri", "")
    if state.get("configured") != public or not _run_exists(MlflowClient(uri), state):
        state = _create_run(folder, config, status=status or state.get("status", "RUNNING"))
        uri = config.mlflow if public != config.mlflow else state["tracking_uri"]
    client = MlflowClient(uri)
    if not state["params_sent"]:
        _send_params(client, folder, state)
    _send_changes(client, folder, state)
    metrics_sent, artifacts_sent = (
        _send_metrics(client, folder, state),
        _send_artifacts(client, folder, state),
    )
    if not state["status_sent"]:
        if state["status"] == "RUNNING":
            client.update_run(state["run_id"], status="RUNNING")
        else:
            client.set_terminated(state["run_id"], state["status"])  # with the time
        state["status_sent"] = True
        _record(folder, state)
    return state | {"metrics_sent": metrics_sent, "artifacts_sent": artifacts_sent}


def _record_status(folder: Path, status: str | None) -> None:
    """Record a new status of the run, before MLflow may be missing or the store may fail."""
    state = run_folder.read_json(folder / STATE)
    if status is not None and status != state.get("status"):
        _record(folder, state | {"status": status, "status_sent": False})


def _record(folder: Path, state: dict[str, Any]) -> None:
    """Record what was sent, so that a retry does not send it again."""
    run_folder.write_json(folder / STATE, state)


def push(folder: Path, config: TrackingConfig, *, status: str | None = None) -> None:
    """Send a run folder's new results, if there is a store. Reports a store that does not answer.

    While this process's own drain still waits for the store after its patience, there is no second wait.
    """
    if config.mlflow is None:
        return
    drain = _unanswered.get(folder.absolute())
    if drain is not None and drain.is_alive():
        _say_behind(folder, config, "still no answer")
        return
    try:
        sync(folder, config, status=status, wait_seconds=WAIT_SECONDS)
    except Exception as error:  # whatever a server or a network may raise; the results are in the folder
        _say_behind(folder, config, error)


def _say_behind(folder: Path, config: TrackingConfig, reason: Exception | str) -> None:
    if isinstance(reason, OtherSender):  # it names the remedy itself
        say(str(reason))
    else:
        say(f"MLflow at {config.mlflow} is behind ({reason}); later: `vaescale sync {folder}`")


def log_files(config: TrackingConfig, name: str, paths: list[Path]) -> None:
    """Send files of several runs as artifacts of a new MLflow run. Without a store this does nothing."""
    if config.mlflow is None:
        return
    with quiet():
        from mlflow import MlflowClient

        client = MlflowClient(absolute_uri(config.mlflow))
        run_id = client.create_run(
            experiment_id(client, config.mlflow or "", config.experiment), run_name=name
        ).info.run_id
        for path in paths:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id)


def _run_exists(client: Any, state: dict[str, Any]) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(state["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the store was deleted or replaced
            return False
        raise
    return True


def _create_run(folder: Path, config: TrackingConfig, *, status: str) -> dict[str, Any]:
    """Create an MLflow run with the run folder's tags, and record it before anything else can fail. Returns the state.

    status: the run's, still to be sent; MLflow begins with RUNNING.
    """
    from mlflow import MlflowClient

    uri = absolute_uri(config.mlflow or "")
    client = MlflowClient(uri)
    experiment = experiment_id(client, config.mlflow or "", config.experiment)
    tags = {name: str(value) for name, value in run_folder.read_json(folder / run_folder.TAGS).items()}
    tags |= _origin(tags.get("git_revision", ""))
    if config.parent:
        tags["mlflow.parentRunId"] = config.parent
    run = client.create_run(experiment, run_name=folder.name, tags=tags)
    state: dict[str, Any] = {"configured": redact(config.mlflow or ""), "tracking_uri": redact(uri)}
    state |= {"experiment_id": experiment, "run_id": run.info.run_id, "params_sent": False}
    state |= {"status": status, "status_sent": status == "RUNNING"}
    state |= {"sent_bytes": 0, "sent_step": {}, "artifacts": {}}
    _record(folder, state)
    return state


def _origin(revision: str) -> dict[str, str]:
    """The tags that MLflow's pages show as a run's source and user."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = ""
    tags = {"mlflow.source.name": "vaescale train", "mlflow.source.type": "LOCAL", "mlflow.user": user}
    commit = re.match(r"[0-9a-f]{7,40}", revision)
    return tags | ({"mlflow.source.git.commit": commit[0]} if commit else {})


def _send_params(client: Any, folder: Path, state: dict[str, Any]) -> None:
    from mlflow.entities import Param

    recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / run_folder.RECIPE))
    params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in flat(recipe).items()]
    for start in range(0, len(params), BATCH_PARAMS):
        client.log_batch(state["run_id"], params=params[start : start + BATCH_PARAMS])
    _send_data(client, folder, state, recipe.get("data", {}))
    state["params_sent"] = True
    _record(folder, state)


def _send_data(client: Any, folder: Path, state: dict[str, Any], data: dict[str, Any]) -> None:
    """Send the two data sets, by hash, as MLflow's inputs of the run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tags = run_folder.read_json(folder / run_folder.TAGS)
    inputs = []
    for split, name, context in (("train", "data_hash", "training"), ("val", "val_data_hash", "validation")):
        location, digest = data.get(split), tags.get(name)
        if location and digest:
            kind, source = _source(redact(str(location)))
            dataset = Dataset(
                Path(str(location)).name, str(digest)[:DIGEST_CHARACTERS], kind, json.dumps(source)
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    if inputs:
        client.log_inputs(state["run_id"], datasets=inputs)


def _source(location: str) -> tuple[str, dict[str, str]]:
    """The kind and content of a data set's source for MLflow: a folder, a URL, or a store named by its scheme."""
    scheme, separator, _ = location.partition("://")
    if not separator:
        return "local", {"uri": location}
    return ("http", {"url": location}) if scheme in ("http", "https") else (scheme, {"uri": location})


def _send_changes(client: Any, folder: Path, state: dict[str, Any]) -> None:
    """Send accepted changes of the recipe as a tag, because params cannot change."""
    changes = run_folder.read_json(folder / run_folder.TAGS).get("changes", [])
    if changes and changes != state.get("changes"):
        client.set_tag(state["run_id"], "changes", redact(json.dumps(changes))[:TAG_CHARACTERS])
        state["changes"] = changes
        _record(folder, state)


def _send_metrics(client: Any, folder: Path, state: dict[str, Any]) -> int:
    """Send complete lines after the last one sent, and record the position after each request. Returns their number of values.

    A training step replayed after a resume is not sent again.
    """
    pending: list[Any] = []
    position, num_sent = state["sent_bytes"], 0

    def flush() -> None:
        for start in range(0, len(pending), BATCH_METRICS):
            client.log_batch(state["run_id"], metrics=pending[start : start + BATCH_METRICS])
        pending.clear()
        if position > state["sent_bytes"]:
            state["sent_bytes"] = position
            _record(folder, state)

    for line in _unsent_lines(folder, position):
        rows = list(run_folder.parse_metrics(line.decode(errors="replace")))
        if len(pending) + sum(map(len, rows)) > BATCH_METRICS:
            flush()  # before sent_step knows of this line
        values = [value for row in rows for value in _unsent_values(row, state)]
        pending += values
        num_sent += len(values)
        position += len(line)
    flush()
    return num_sent


def _unsent_lines(folder: Path, position: int) -> list[bytes]:
    """The complete lines of metrics.jsonl from a byte position on."""
    path = folder / run_folder.METRICS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _unsent_values(row: dict[str, float], state: dict[str, Any]) -> list[Any]:
    """The MLflow metrics of one row, without those of replayed steps. Updates state's sent_step."""
    from mlflow.entities import Metric

    if run_folder.ROLLBACK in row:  # the rows that follow are not replays
        state["sent_step"] = {name: min(step, row["step"]) for name, step in state["sent_step"].items()}
    metrics = []
    for name in row.keys() - {"step", "time"}:
        if name.startswith(REPLAYED) and row["step"] <= state["sent_step"].get(name, -1):
            continue
        mlflow_name = re.sub(r"[^\w. :/-]", "_", name)  # the names that MLflow takes
        metrics.append(Metric(mlflow_name, row[name], int(row["time"] * 1000), int(row["step"])))
        state["sent_step"][name] = row["step"]
    return metrics


def _send_artifacts(client: Any, folder: Path, state: dict[str, Any]) -> int:
    """Send files that are new or changed, and record each. Returns their number."""
    num_sent = 0
    for path in _artifacts(folder):
        try:
            num_sent += _send_artifact(client, folder, state, path)
        except FileNotFoundError:
            if path.exists():
                raise
            # Another process deleted the file after it was listed.
    return num_sent


def _artifacts(folder: Path) -> list[Path]:
    """The files to send, without temporary and lock files, whose names begin with a dot."""
    paths = []
    for pattern in ARTIFACTS:
        with suppress(FileNotFoundError):  # a folder deleted while it is listed
            paths += sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    return paths


def _send_artifact(client: Any, folder: Path, state: dict[str, Any], path: Path) -> bool:
    """Send a file that is new or changed, and record it. Returns whether it was sent."""
    name, status = str(path.relative_to(folder)), path.stat()
    known = state["artifacts"].get(name, [""])
    if known[1:] == [status.st_size, status.st_mtime_ns]:
        return False  # unchanged: do not hash it every few seconds
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    is_changed = bool(known[0] != digest)
    if is_changed:
        parent = str(path.relative_to(folder).parent)
        client.log_artifact(state["run_id"], str(path), None if parent == "." else parent)
    state["artifacts"][name] = [digest, status.st_size, status.st_mtime_ns]
    _record(folder, state)
    return is_changed
