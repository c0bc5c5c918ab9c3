"""A real MLflow server that is slow, dies while a run goes on, and comes back: no step waits, and every row arrives."""

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.mlflow_server import Server
from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow_state import STATE
from vaescale.runs.tracking import Drain, TrackingConfig, sync

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),
]  # MLflow warns of itself


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: run\n")
    run_folder.write_json(folder / "run.json", {"world_size": 1})
    return folder


def test_a_server_that_dies_and_comes_back_gets_every_row(
    run: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
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
        state = run_folder.read_json(run / STATE)
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
    run: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys, seconds: float
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
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
    shutil.rmtree(run / STATE, ignore_errors=True)
    state = sync(run, later)
    assert len(MlflowClient(later.mlflow).get_metric_history(state["run_id"], "train/mse")) == 49
