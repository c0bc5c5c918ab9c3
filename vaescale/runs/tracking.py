"""Tracking in MLflow from the run folder: metrics.jsonl is written first, and sent in the background.

A run can therefore train while the tracking server is away. What was not sent stays in the folder; `vaescale sync RUN`
sends the rest. `RUN/mlflow.json` records the MLflow run and what was sent after each request, so nothing is sent twice. It
holds only the run's place and status until the store has answered for the first time.
One thread of one process sends a run at a time, under the lock `RUN/.mlflow.lock`.
"""

import getpass
import re
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from vaescale.config import Config
from vaescale.errors import MissingPackage, Preempted, UserError
from vaescale.runs import folder as run_folder
from vaescale.runs import mlflow_state
from vaescale.runs.mlflow_state import FOLDER_ID, State, record
from vaescale.runs.parents import PARENT, REPLACES
from vaescale.runs.sender import TAG_CHARACTERS, Sender, cut
from vaescale.runs.store_faults import StoreFault, explained, was_deleted
from vaescale.runs.stores import (
    absolute_uri,
    be_patient,
    client_of,
    experiment_id,
    is_installed,
    quiet,
    refuse_malformed,
)
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive
from vaescale.system.secrets import is_redacted, redact

LOCK = ".mlflow.lock"
WAIT_SECONDS = 60.0  # for another sender of the same run
UPLOAD_SECONDS = (
    10.0  # for one file, before rows go on; launchers and clusters kill 30 s after they asked to stop
)
REPLACED = {  # tags that name another run of MLflow
    "copied_from": "vaescale.copied_from",
    "replaces": REPLACES,
}


class TrackingConfig(Config):
    """The MLflow store in which runs are compared."""

    mlflow: str | None = Field(
        default="sqlite:///runs/mlflow.db", description="URI of the MLflow store; null: none"
    )

    @field_validator("mlflow")
    @classmethod
    def _is_a_store(cls, uri: str | None) -> str | None:
        if uri is not None:
            refuse_malformed(uri)
        return uri

    experiment: str = Field(default="vaescale", description="name of the MLflow experiment")
    parent: str | None = Field(default=None, description="id of the parent run in MLflow; a sweep sets it")


class _Told:
    """What this process has said of a run folder's store, so that it says it once."""

    def __init__(self) -> None:
        self.fault, self.is_behind = "", False


_unanswered: dict[Path, threading.Thread] = {}  # by run folder: the drain that still waits for its store
_told: dict[Path, _Told] = {}  # by run folder


class OtherSender(UserError):
    """Another process or thread sends the same run to MLflow, for longer than the wait."""


class Drain:
    """A thread that sends a run folder to MLflow, every few seconds and at the end: `with Drain(folder, config):`.

    It never raises and never makes a step wait. A store that cannot be used is reported after the first round. While another
    process sends this run, it tries again in the next round; only the last round waits, for `patience` seconds. shown: true
    on the first process, the only one that sends.
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
            # The thread meets a fault again, and reports it.
            with suppress(LockHeldError, UserError, OSError), exclusive(self._folder / LOCK):
                mlflow_state.begin(self._folder, self._status)
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
        is_first, last = True, False
        while not last:
            last = self._stop.wait(self._every)
            try:
                wait_seconds = self._patience if last else 0.0
                sync(
                    self._folder,
                    self._config,
                    status=self._status,
                    wait_seconds=wait_seconds,
                    upload_seconds=UPLOAD_SECONDS,
                )
                self._fault = None
            except Exception as error:  # whatever a server or a network may raise; the run continues
                self._fault = error
                if isinstance(error, StoreFault) and not last and (is_first or not error.passes):
                    _say_fault(self._folder, self._config, error)
            is_first = False


def sync(
    folder: Path,
    config: TrackingConfig,
    *,
    status: str | None = None,
    ended_ms: int | None = None,
    wait_seconds: float = WAIT_SECONDS,
    upload_seconds: float | None = None,
) -> dict[str, Any]:
    """Send what MLflow does not have yet: params, tags, metrics, the status, artifacts.

    Returns the new content of mlflow.json, with metrics_sent and artifacts_sent, the numbers sent by this call. status: the
    run's, when it changes; remembered until it is sent, with the time ended_ms, by default now. wait_seconds: how long to wait
    while another process or thread sends this run; upload_seconds: how long for one artifact, by default to its end. Raises
    OtherSender, and StoreFault when the store does not take all.
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
            state = mlflow_state.begin(folder, status, ended_ms=ended_ms)
            with quiet():
                return _send(folder, config, state, upload_seconds)
    except LockHeldError as error:
        raise OtherSender(
            f"another process sends {folder} to MLflow ({error.holder}); when it has ended: `vaescale sync {folder}`"
        ) from None


def _send(folder: Path, config: TrackingConfig, state: State, upload_seconds: float | None) -> dict[str, Any]:
    """Send what MLflow does not have yet, while holding the lock (see `sync`)."""
    uri = mlflow_state.store_uri(folder, config.mlflow or "", state)
    client, run = _connect(folder, config, state, uri)
    if state["tracking_uri"] != redact(uri):  # the store was moved
        state["tracking_uri"] = redact(uri)
        record(folder, state)
    sender = partial(Sender, folder=folder, state=state, parent=config.parent, upload_seconds=upload_seconds)
    try:
        sent = sender(client, uri, run).send()
    except StoreFault as fault:
        if not was_deleted(fault):
            raise
        # After it was looked at: the new run gets everything.
        client, run = _connect(folder, config, state, uri)
        sent = sender(client, uri, run).send()
    _told.pop(folder.absolute(), None)
    return state | sent


def _connect(folder: Path, config: TrackingConfig, state: State, uri: str) -> tuple[Any, Any]:
    """MLflow's client of a store, and the run of a folder, made if there is none."""
    try:
        client = client_of(uri)
        run = _known_run(client, config, state)
        if run is None:
            run = _create_run(client, uri, folder, config, state)
    except UserError:
        raise
    except Exception as error:  # whatever a server or a network may raise
        raise explained(error, uri) from error
    return client, run


def push(folder: Path, config: TrackingConfig, *, status: str | None = None) -> None:
    """Send a run folder's new results, if there is a store. Reports a store that does not take them.

    While this process's own drain still waits for the store after its patience, there is no second wait.
    """
    if config.mlflow is None:
        return
    drain = _unanswered.get(folder.absolute())
    if drain is not None and drain.is_alive():
        _say_behind(folder, config, "still no answer")
        return
    try:
        sync(folder, config, status=status, wait_seconds=WAIT_SECONDS, upload_seconds=WAIT_SECONDS)
    except Exception as error:  # whatever a server or a network may raise; the results are in the folder
        _say_behind(folder, config, error)


def _say_fault(folder: Path, config: TrackingConfig, fault: StoreFault) -> None:
    """Report at the start of training what is wrong with its store, once."""
    told = _told.setdefault(folder.absolute(), _Told())
    sentence = fault.sentence(config.mlflow or "")
    if told.fault != sentence:
        told.fault = sentence
        say(
            f"{sentence}. Training goes on, rows and files stay in {folder}; when that is mended they are sent, by this run "
            f"or by `vaescale sync {folder}`"
        )


def _say_behind(folder: Path, config: TrackingConfig, reason: Exception | str) -> None:
    """Report that MLflow lacks something of a run, once, and why unless that was said."""
    if isinstance(reason, OtherSender | MissingPackage):  # they name the remedy themselves
        say(str(reason))
        return
    told = _told.setdefault(folder.absolute(), _Told())
    if told.is_behind:
        return
    told.is_behind = True
    fault = reason if isinstance(reason, StoreFault) else None
    if fault is not None and fault.sentence(config.mlflow or "") == told.fault:
        say(
            f"MLflow at {config.mlflow} is behind, as said before; when that is mended: `vaescale sync {folder}`"
        )
    elif fault is not None and not fault.passes:
        say(f"{fault.sentence(config.mlflow or '')}; MLflow is behind until then: `vaescale sync {folder}`")
    else:
        detail = fault.reason if fault is not None else reason
        say(f"MLflow at {config.mlflow} is behind ({detail}); later: `vaescale sync {folder}`")


def log_files(config: TrackingConfig, name: str, paths: list[Path]) -> None:
    """Send files of several runs as artifacts of a new MLflow run, if there is a store. Reports a store that does not take them."""
    if config.mlflow is None:
        return
    be_patient()
    try:
        with quiet():
            uri = absolute_uri(config.mlflow)
            client = client_of(uri)
            experiment = experiment_id(client, uri, config.experiment)
            run_id = client.create_run(experiment, run_name=name).info.run_id
            for path in paths:
                client.log_artifact(run_id, str(path))
            client.set_terminated(run_id)
    except Exception as error:  # whatever a server or a network may raise; the files are on the disk
        say(explained(error, config.mlflow).sentence(config.mlflow))


def _known_run(client: Any, config: TrackingConfig, state: State) -> Any:
    """The MLflow run that a folder has, or None when it has none in this store, or no longer."""
    from mlflow.exceptions import MlflowException

    if "run_id" not in state or state.get("configured") != redact(config.mlflow or ""):
        return None
    try:
        run = client.get_run(state["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # the store was deleted or replaced
    owner = run.data.tags.get(FOLDER_ID)
    if run.info.lifecycle_stage == "deleted":
        lost = "was deleted"
    elif owner not in (None, state["folder_id"], state.get("previous_folder_id")):
        lost = "belongs to another copy of the folder"
    else:
        if owner != state["folder_id"]:
            client.set_tag(state["run_id"], FOLDER_ID, state["folder_id"])
        return run
    state["replaces"] = state["run_id"]
    state["lost"] = lost
    return None


def _create_run(client: Any, uri: str, folder: Path, config: TrackingConfig, state: State) -> Any:
    """Create an MLflow run with the run folder's tags, and record it in `state` before anything else can fail.

    The status is still to be sent; MLflow begins with RUNNING.
    """
    experiment = experiment_id(client, uri, config.experiment)
    if lost := state.pop("lost", None):
        say(
            f"the MLflow run {state['replaces']} of {folder} {lost}; a new run gets everything, and names it in the tag "
            f"{REPLACED['replaces']}"
        )
    begun = run_folder.started(folder)
    run = client.create_run(
        experiment,
        run_name=folder.absolute().name,
        tags=_tags(folder, config, state),
        start_time=None if begun is None else int(begun * 1000),
    )
    for name in REPLACED:
        state.pop(name, None)
    state |= {"configured": redact(config.mlflow or ""), "tracking_uri": redact(uri)}
    state |= {"experiment_id": experiment, "run_id": run.info.run_id, "params_sent": False}
    status = state.get("status", "RUNNING")
    state |= {"status": status, "status_sent": status == "RUNNING"}
    state |= {"sent_bytes": 0, "sent_step": {}, "artifacts": {}}
    for name in ("changes", "models", "held_out"):
        state.pop(name, None)
    record(folder, state)
    return run


def _tags(folder: Path, config: TrackingConfig, state: State) -> dict[str, str]:
    """The tags of a new MLflow run."""
    known = run_folder.read_json(folder / run_folder.TAGS)
    tags = {
        name: cut(str(value), TAG_CHARACTERS, whole=run_folder.TAGS)
        for name, value in known.items()
        if name != "changes"  # sent as JSON
    }
    tags |= _origin(tags.get("git_revision", "")) | {FOLDER_ID: state["folder_id"]}
    tags |= {tag: state[name] for name, tag in REPLACED.items() if name in state}
    return tags | ({PARENT: config.parent} if config.parent else {})


def _origin(revision: str) -> dict[str, str]:
    """The tags that MLflow's pages show as a run's source and user."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = ""
    tags = {"mlflow.source.name": "vaescale train", "mlflow.source.type": "LOCAL", "mlflow.user": user}
    commit = re.match(r"[0-9a-f]{7,40}", revision)
    return tags | ({"mlflow.source.git.commit": commit[0]} if commit else {})
