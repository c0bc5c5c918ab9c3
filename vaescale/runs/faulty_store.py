"""An MLflow store for one run folder that loses the run, and whose files' server stops answering, on purpose."""

import hashlib
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from vaescale.runs import folder as run_folder
from vaescale.runs import mlflow_state
from vaescale.runs.sender import artifacts_of
from vaescale.runs.stores import be_patient, client_of, quiet
from vaescale.runs.tracking import TrackingConfig, sync
from vaescale.system.faults import Family, runs, terminate

EXPERIMENT = "chaos"
MOST_BYTES = 1 << 28  # of a file
NOTICED_WITHIN = 40.0  # seconds in which a run is sent to the store, or sent anew
WITHHELD_SECONDS = 8.0  # longer than the pause between two rounds of sending
HUNG_SECONDS = 120.0  # longer than a request waits


class FaultyStore:
    """A SQLite store in `folder`, with a server in this process for the files of its runs: `with FaultyStore(folder, run) as store:`.

    run: the run folder that `lose_run` and `withhold_files` disturb. uri and EXPERIMENT: what its recipe must name.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.uri, self._run = f"sqlite:///{folder.absolute()}/mlflow.db", run
        self._files = _Files(folder / "files")

    def __enter__(self) -> Self:
        be_patient()
        with quiet():
            client = client_of(self.uri)
            if client.get_experiment_by_name(EXPERIMENT) is None:
                client.create_experiment(EXPERIMENT, artifact_location=self._files.uri)
        threading.Thread(target=self._files.serve_forever, daemon=True, name="files").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answer()
        self._files.shutdown()
        self._files.server_close()

    def lose_run(self, family: Family) -> None:
        """Delete the run in MLflow, wait until training has a new one there, and ask training to stop."""
        lost = self._wait_for_other_run(family, None)
        if lost is not None:
            with quiet():
                client_of(self.uri).delete_run(lost)
            self._wait_for_other_run(family, lost)
        terminate(family)

    def withhold_files(self, family: Family) -> None:
        """Stop answering when a new result of the run is sent, and ask training to stop; `answer` ends it."""
        self._files.answers.clear()
        result = self._run / "evaluation" / f"chaos-{uuid.uuid4().hex}.json"
        result.parent.mkdir(exist_ok=True)
        run_folder.write_json(result, {"result": result.stem})
        time.sleep(WITHHELD_SECONDS)
        terminate(family)

    def _wait_for_other_run(self, family: Family, before: str | None) -> str | None:
        """The id of the MLflow run, once it is another one; `before` when training ends or takes long to make it."""
        deadline = time.monotonic() + NOTICED_WITHIN
        while runs(family.first) and time.monotonic() < deadline:
            if (current := mlflow_state.read(self._run).get("run_id")) != before:
                return str(current)
            time.sleep(0.1)
        return before

    def answer(self) -> None:
        """Let the server of the files answer again."""
        self._files.answers.set()

    def lacks(self) -> dict[str, int]:
        """Send what MLflow lacks of the run. Returns the numbers of training rows and of files that it then has not."""
        sync(self._run, TrackingConfig(mlflow=self.uri, experiment=EXPERIMENT))
        run_id = mlflow_state.read(self._run)["run_id"]
        with quiet():
            points = client_of(self.uri).get_metric_history(run_id, "train/mse")
        rows = {
            (row["step"], row["train/mse"])
            for row in run_folder.read_metrics(self._run)
            if "train/mse" in row
        }
        files = [
            path
            for path in artifacts_of(self._run)
            if _sha256(path)
            != _sha256(self._files.folder / run_id / "artifacts" / path.relative_to(self._run))
        ]
        return {
            "store_rows_lost": len(rows - {(point.step, point.value) for point in points}),
            "store_files_lost": len(files),
        }


class _Files(ThreadingHTTPServer):
    """A server on this machine's loopback that keeps what is PUT below a folder. answers: cleared while it does not answer."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Put)
        self.folder, self.answers = folder, threading.Event()
        self.answers.set()
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Write nothing of a client that gave up."""


class _Put(BaseHTTPRequestHandler):
    server: _Files

    def do_PUT(self) -> None:
        if not self.server.answers.wait(HUNG_SECONDS):
            self.close_connection = True
            return
        root = self.server.folder.resolve()
        path = (root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        size = int(self.headers.get("Content-Length", 0))
        if not path.is_relative_to(root) or not 0 <= size <= MOST_BYTES:
            self.send_error(400)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(size))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write nothing."""


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
