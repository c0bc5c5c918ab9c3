"""A store that loses a run, and a server of files that does not answer, on purpose."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaescale.runs import faulty_store, mlflow_state
from vaescale.runs.faulty_store import EXPERIMENT, FaultyStore
from vaescale.runs.store_faults import StoreFault
from vaescale.runs.tracking import TrackingConfig, sync
from vaescale.system import faults
from vaescale.system.faults import Family

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


@pytest.fixture
def store(
    run: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyStore]:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setattr(faulty_store, "WITHHELD_SECONDS", 0.0)
    monkeypatch.setattr(faulty_store, "NOTICED_WITHIN", 0.2)
    monkeypatch.setattr(faults, "CAUGHT_WITHIN", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyStore(tmp_path, run) as opened:
        yield opened


@pytest.fixture
def family() -> Iterator[Family]:
    """A process that can be asked to stop: an earlier test may have left SIGTERM ignored, which processes inherit."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with subprocess.Popen(["sleep", "60"]) as started:
        signal.signal(signal.SIGTERM, before)
        yield Family.of(started.pid)
        started.kill()


def test_what_the_store_lacks_is_counted(store: FaultyStore, run: Path, tmp_path: Path) -> None:
    assert store.lacks() == {"store_rows_lost": 0, "store_files_lost": 0}
    run_id = mlflow_state.read(run)["run_id"]
    arrived = tmp_path / "files" / run_id / "artifacts" / "recipe.yaml"
    assert arrived.read_text() == "name: one\n"
    arrived.unlink()
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write(
            '{"step": 2, "time": 1e9, "train/mse": 7.0}\n'
        )  # a replayed step of another value is not sent
    assert store.lacks() == {"store_rows_lost": 1, "store_files_lost": 1}


def test_a_lost_run_is_made_anew(store: FaultyStore, run: Path, family: Family) -> None:
    config = TrackingConfig(mlflow=store.uri, experiment=EXPERIMENT)
    first = sync(run, config, status="FINISHED")["run_id"]
    store.lose_run(family)
    assert os.waitpid(family.first, 0)[1] == 15, "and training is asked to stop"
    assert store.lacks() == {"store_rows_lost": 0, "store_files_lost": 0}
    assert mlflow_state.read(run)["run_id"] != first


def test_files_wait_until_their_server_answers(store: FaultyStore, run: Path, family: Family) -> None:
    config = TrackingConfig(mlflow=store.uri, experiment=EXPERIMENT)
    sync(run, config)
    store.withhold_files(family)
    assert os.waitpid(family.first, 0)[1] == 15
    with pytest.raises(StoreFault, match=r"no answer for evaluation/chaos-\w+\.json"):
        sync(run, config, status="KILLED", upload_seconds=0.05)
    assert mlflow_state.read(run)["status_sent"]
    store.answer()
    assert store.lacks() == {"store_rows_lost": 0, "store_files_lost": 0}
