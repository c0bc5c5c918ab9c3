"""A project with a store and a run in it."""

import shutil
from pathlib import Path

import pytest

from tests.runs.tracked import make_run
from vaescale.runs.tracking import TrackingConfig


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an empty store in `runs`."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    shutil.copy(empty_store, folder / "runs" / "mlflow.db")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def config() -> TrackingConfig:
    return TrackingConfig(mlflow="sqlite:///runs/mlflow.db", experiment="tests")


@pytest.fixture
def run(project: Path) -> Path:
    return make_run(project / "runs" / "one")
