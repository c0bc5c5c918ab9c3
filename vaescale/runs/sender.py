"""What MLflow gets of a run folder: params, tags, metrics, the status and artifacts, each recorded when it was sent.

A kind that fails does not keep the others back; only a store that does not answer ends the round. Artifacts come last, because
they often go to another service than the rest.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.runs import logged_models
from vaescale.runs.mlflow_state import State, record
from vaescale.runs.parents import link_parent
from vaescale.runs.store_faults import StoreFault, explained, explained_files
from vaescale.runs.stores import refuse_moved_artifacts
from vaescale.system.secrets import redact

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
    "prior/*.*",
)


class _Upload(threading.Thread):
    """The sending of one file, which may take longer than its caller waits. file: the MLflow run, the file's name and sha256.

    begun: when it started, by time.monotonic.
    """

    def __init__(self, file: tuple[str, str, str], send: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="mlflow-file")
        self.file, self._send, self.begun = file, send, time.monotonic()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever an artifact store may raise; the waiting thread raises it
            self.error = error


_uploads: dict[Path, _Upload] = {}  # by run folder: the file whose sending took longer than it was waited for


class Sender:
    """The sending of one run folder to its MLflow run. state: the content of mlflow.json, changed and recorded as kinds are sent.

    parent: the id of the run that groups this one with others, or None. upload_seconds: how long to wait for one file, from the start of its upload, before it is sent on in the background; None:
    until it is sent.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        run: Any,
        folder: Path,
        state: State,
        *,
        parent: str | None,
        upload_seconds: float | None,
    ) -> None:
        self._client, self._uri, self._run, self._folder, self._state = client, uri, run, folder, state
        self._run_id = state["run_id"]
        self._parent, self._upload_seconds = parent, upload_seconds

    def send(self) -> dict[str, int]:
        """Send what MLflow lacks. Returns metrics_sent and artifacts_sent. Raises StoreFault for the first kind that failed."""
        faults: list[StoreFault] = []
        sent = {"metrics_sent": 0, "artifacts_sent": 0}
        for name, send in (
            ("params_sent", self._send_params),
            ("changes_sent", self._send_changes),
            ("metrics_sent", self._send_metrics),
            ("models_sent", self._send_models),
            ("status_sent", self._send_status),
            ("parent_linked", self._link_parent),
            ("artifacts_sent", self._send_artifacts),
        ):
            try:
                count = send()
            except UserError:  # of a damaged file in the run folder
                raise
            except Exception as error:  # whatever a server or a network may raise
                fault = self._explained(error, is_file=name == "artifacts_sent")
                fault.__cause__ = error
                faults.append(fault)
                if fault.passes:
                    break
            else:
                sent |= {name: count} if name in sent else {}
        if faults:
            raise faults[0]
        return sent

    def _explained(self, error: Exception, *, is_file: bool) -> StoreFault:
        return explained_files(error, self._run.info.artifact_uri) if is_file else explained(error, self._uri)

    def _record(self) -> None:
        record(self._folder, self._state)

    def _send_params(self) -> int:
        from mlflow.entities import Param

        if self._state["params_sent"]:
            return 0
        recipe: Any = OmegaConf.to_container(OmegaConf.load(self._folder / run_folder.RECIPE))
        params = [
            Param(name, cut(str(value), PARAM_CHARACTERS, whole=run_folder.RECIPE))
            for name, value in flat(recipe).items()
        ]
        for start in range(0, len(params), BATCH_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + BATCH_PARAMS])
        self._send_data(recipe.get("data", {}))
        self._state["params_sent"] = True
        self._record()
        return len(params)

    def _send_data(self, data: dict[str, Any]) -> None:
        """Send the two data sets, by hash, as MLflow's inputs of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = run_folder.read_json(self._folder / run_folder.TAGS)
        inputs = []
        for split, name, context in (
            ("train", "data_hash", "training"),
            ("val", "val_data_hash", "validation"),
        ):
            location, digest = _location(data.get(split)), tags.get(name)
            if location and digest:
                kind, source = _source(redact(str(location)))
                dataset = Dataset(
                    Path(str(location)).name, str(digest)[:DIGEST_CHARACTERS], kind, json.dumps(source)
                )
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self._client.log_inputs(self._run_id, datasets=inputs)

    def _send_changes(self) -> int:
        """Send accepted changes of recipe and data as a tag, and each changed key's value as `current.KEY`: params cannot change."""
        changes = run_folder.read_json(self._folder / run_folder.TAGS).get("changes", [])
        if not changes or changes == self._state.get("changes"):
            return 0
        text = cut(redact(json.dumps(changes)), TAG_CHARACTERS, whole=run_folder.TAGS)
        self._client.set_tag(self._run_id, "changes", text)
        for name, value in self._current(changes).items():
            self._client.set_tag(
                self._run_id, f"current.{name}", cut(value, TAG_CHARACTERS, whole=run_folder.RECIPE)
            )
        self._state["changes"] = changes
        self._record()
        return 1

    def _current(self, changes: list[dict[str, Any]]) -> dict[str, str]:
        """The value that each changed key has now, without credentials. changes: as run.json has them, `KEY: OLD -> NEW` each."""
        recipe: Any = OmegaConf.to_container(OmegaConf.load(self._folder / run_folder.RECIPE))
        known = flat(recipe) | run_folder.read_json(self._folder / run_folder.TAGS)
        keys = dict.fromkeys(phrase.partition(":")[0] for one in changes for phrase in one["changes"])
        return {key: redact(str(known[key])) for key in keys if key in known}

    def _send_models(self) -> int:
        """Send the checkpoints as logged models, with the held-out metrics of their steps."""
        if "held_out" not in self._state:  # of a run that an earlier version sent
            path = self._folder / run_folder.METRICS
            for row in run_folder.parse_metrics(path.read_text() if path.is_file() else ""):
                logged_models.note(self._state, row)
        return logged_models.send(self._client, self._run, self._folder, self._state, self._record)

    def _send_status(self) -> int:
        state = self._state
        if state["status_sent"]:
            return 0
        if state["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, state["status"], state.get("ended_ms"))
        state["status_sent"] = True
        self._record()
        return 1

    def _link_parent(self) -> int:
        return 0 if self._parent is None else int(link_parent(self._client, self._run, self._parent))

    def _send_metrics(self) -> int:
        """Send complete lines after the last one sent, and record the position after each request. Returns their number of values.

        A training step replayed after a resume is not sent again.
        """
        state = self._state
        pending: list[Any] = []
        position, num_sent = state["sent_bytes"], 0

        def flush() -> None:
            for start in range(0, len(pending), BATCH_METRICS):
                self._client.log_batch(self._run_id, metrics=pending[start : start + BATCH_METRICS])
            pending.clear()
            if position > state["sent_bytes"]:
                state["sent_bytes"] = position
                self._record()

        for line in _unsent_lines(self._folder, position):
            rows = list(run_folder.parse_metrics(line.decode(errors="replace")))
            if len(pending) + sum(map(len, rows)) > BATCH_METRICS:
                flush()  # before sent_step knows of this line
            values = [value for row in rows for value in _unsent_values(row, state)]
            pending += values
            num_sent += len(values)
            position += len(line)
        flush()
        return num_sent

    def _send_artifacts(self) -> int:
        """Send files that are new or changed, and record each. Returns their number."""
        num_sent, is_checked = 0, False
        for path in artifacts_of(self._folder):
            try:
                digest = self._changed(path)
                if digest is None:
                    continue
                if not is_checked:
                    refuse_moved_artifacts(self._client, self._uri, self._run)
                    is_checked = True
                self._send_artifact(path, digest)
                num_sent += 1
            except FileNotFoundError:
                if path.exists():
                    raise
                # Another process deleted the file after it was listed.
        return num_sent

    def _changed(self, path: Path) -> str | None:
        """The sha256 of a file that is new or changed, else None."""
        name, status = str(path.relative_to(self._folder)), path.stat()
        known = self._state["artifacts"].get(name, [""])
        if known[1:] == [status.st_size, status.st_mtime_ns]:
            return None  # do not hash it every few seconds
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if known[0] != digest:
            return digest
        self._note(name, digest, path)
        return None

    def _note(self, name: str, digest: str, path: Path) -> None:
        status = path.stat()
        self._state["artifacts"][name] = [digest, status.st_size, status.st_mtime_ns]
        self._record()

    def _send_artifact(self, path: Path, digest: str) -> None:
        name, parent = str(path.relative_to(self._folder)), str(path.relative_to(self._folder).parent)

        def send() -> None:
            self._client.log_artifact(self._run_id, str(path), None if parent == "." else parent)

        file = (self._run_id, name, digest)
        upload = _uploads.pop(self._folder, None)
        while upload is None or upload.file != file:
            if upload is not None:
                self._wait_for(upload, 0.0)
            upload = _Upload(file, send)
            upload.start()
        # An upload that earlier rounds waited for is only looked at: the end of a run does not wait for it again.
        left = max(0.0, upload.begun + (self._upload_seconds or 0.0) - time.monotonic())
        self._wait_for(upload, left)
        if upload.error is not None:
            raise upload.error
        self._note(name, digest, path)

    def _wait_for(self, upload: _Upload, seconds: float) -> None:
        """Wait for the end of an upload. Raises StoreFault when it takes longer; the next round looks at it again."""
        upload.join(None if self._upload_seconds is None else seconds)
        if upload.is_alive():
            _uploads[self._folder] = upload
            place = redact(self._run.info.artifact_uri)
            raise StoreFault(f"{place}: no answer for {upload.file[1]}", passes=True, files=True)


def cut(text: str, most: int, *, whole: str) -> str:
    """A text of at most `most` characters; one that is cut says so, and where the whole text is: the run folder's file `whole`."""
    if len(text) <= most:
        return text
    mark = f"... [cut: {len(text)} characters; whole in {whole}]"
    return text[: most - len(mark)] + mark


def _location(place: Any) -> Any:
    """Where a data set is; of several, all places in a row."""
    if isinstance(place, list):
        return " + ".join(str(one["path"]) for one in place if one.get("weight") != 0)
    return place


def _source(location: str) -> tuple[str, dict[str, str]]:
    """The kind and content of a data set's source for MLflow: a folder, a URL, or a store named by its scheme."""
    scheme, separator, _ = location.partition("://")
    if not separator:
        return "local", {"uri": location}
    return ("http", {"url": location}) if scheme in ("http", "https") else (scheme, {"uri": location})


def _unsent_lines(folder: Path, position: int) -> list[bytes]:
    """The complete lines of metrics.jsonl from a byte position on."""
    path = folder / run_folder.METRICS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _unsent_values(row: dict[str, float], state: State) -> list[Any]:
    """The MLflow metrics of one row, without those of replayed steps. Updates state's sent_step."""
    from mlflow.entities import Metric

    if run_folder.ROLLBACK in row:  # the rows that follow are not replays
        state["sent_step"] = {name: min(step, row["step"]) for name, step in state["sent_step"].items()}
    logged_models.note(state, row)
    metrics = []
    unsent = (
        {run_folder.ROLLBACK} if run_folder.CHANGED in row else set()
    )  # a change of the recipe is no rollback
    for name in row.keys() - {"step", "time", run_folder.CHANGED} - unsent:
        if name.startswith(REPLAYED) and row["step"] <= state["sent_step"].get(name, -1):
            continue
        mlflow_name = re.sub(r"[^\w. :/-]", "_", name)  # the names that MLflow takes
        metrics.append(Metric(mlflow_name, row[name], int(row["time"] * 1000), int(row["step"])))
        state["sent_step"][name] = row["step"]
    return metrics


def artifacts_of(folder: Path) -> list[Path]:
    """The files of a run folder that MLflow gets, without temporary and lock files, whose names begin with a dot."""
    paths = []
    for pattern in ARTIFACTS:
        with suppress(FileNotFoundError):  # a folder deleted while it is listed
            paths += sorted(
                path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")
            )
    return paths
