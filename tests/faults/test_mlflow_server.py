"""A real MLflow server that is slow, dies while a run goes on, and comes back: no step waits, and every row arrives."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vaescale.training import folder as run_folder
from vaescale.training import tracking
from vaescale.training.tracking import Drain, TrackingConfig, sync

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),
]  # MLflow warns of itself


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


class Server:
    """`mlflow server` on this machine, on one store over all its lives."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words, *store],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:  # noqa: S310
                    assert answer.status == 200
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail("the MLflow server did not start within a minute")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: run\n")
    run_folder.write_json(folder / "run.json", {"world_size": 1})
    return folder


def test_a_server_that_dies_and_comes_back_gets_every_row(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path)
    config = TrackingConfig(mlflow=server.uri, experiment="tests")
    longest = 0.0

    def steps(numbers: range) -> None:
        nonlocal longest
        for step in numbers:
            begun = time.perf_counter()
            run_folder.append_metrics(run, step, {"train/mse": 1 / step})
            longest = max(longest, time.perf_counter() - begun)
            time.sleep(0.01)

    try:
        server.start()
        with Drain(run, config, shown=True, every_seconds=0.1):
            steps(range(1, 100))
            server.kill()
            steps(range(100, 300))
            server.start()
            steps(range(300, 400))
        state = run_folder.read_json(run / tracking.STATE)
        client = MlflowClient(server.uri)
        rows = client.get_metric_history(state["run_id"], "train/mse")
        assert sorted((row.step, row.value) for row in rows) == [(step, 1 / step) for step in range(1, 400)]
        assert client.get_run(state["run_id"]).info.status == "FINISHED"
        assert longest < 0.5, "a step waits for the disk alone"
    finally:
        server.kill()


class Refusing(BaseHTTPRequestHandler):
    """Answers 500 after a while."""

    seconds = 0.0

    def do_GET(self) -> None:
        time.sleep(self.seconds)
        self.send_error(500, "something is wrong")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("seconds", [0.0, 3.0], ids=["errors", "slow errors"])
def test_a_server_that_answers_500_stops_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, seconds: float
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Refusing, "seconds", seconds)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = TrackingConfig(mlflow=f"http://127.0.0.1:{server.server_address[1]}", experiment="tests")
        begun = time.perf_counter()
        with Drain(run, config, shown=True, every_seconds=0.05, patience=1.0):
            for step in range(1, 50):
                run_folder.append_metrics(run, step, {"train/mse": 1 / step})
        assert time.perf_counter() - begun < 5
        server.shutdown()
    assert "vaescale sync" in capsys.readouterr().err
    later = TrackingConfig(mlflow=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")
    shutil.rmtree(run / tracking.STATE, ignore_errors=True)
    state = sync(run, later)
    assert len(MlflowClient(later.mlflow).get_metric_history(state["run_id"], "train/mse")) == 49
