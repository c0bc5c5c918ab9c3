"""Metrics in TensorBoard, Weights & Biases and trackio, each where it is installed."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from vaescale.runs.folder import ROLLBACK, append_metrics, locked, read_json, read_metrics


@pytest.fixture
def run(tmp_path: Path, recipe_content: dict[str, Any]) -> Path:
    """A run folder with rows as training leaves them, without weights; step 4 was trained twice, after a rollback."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    for step in (2, 4):
        append_metrics(folder, step, {"train/mse": 1 / step, "train/sigma": 0.5})
    append_metrics(folder, 2, {ROLLBACK: 0.5})
    append_metrics(folder, 4, {"train/mse": 0.2})
    append_metrics(folder, 4, {"val/mse": 0.3})
    return folder


def test_tensorboard_has_the_rows_that_count(vaescale, run: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second time in place of the first
        outcome = vaescale("sync", run, "--to", "tensorboard", "--json")
        assert outcome.code == 0, outcome.err
        assert outcome.json == {"to": str(run / "tensorboard"), "rows_sent": 2, "figures_sent": 0}
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    found = {
        name: [(event.step, event.wall_time, round(event.value, 6)) for event in events.Scalars(name)]
        for name in ("train/mse", "val/mse")
    }
    first, second = read_metrics(run)
    assert found == {
        "train/mse": [(2, first["time"], 0.5), (4, second["time"], 0.2)],
        "val/mse": [(4, second["time"], 0.3)],
    }


def test_wandb_gets_each_step_once(vaescale, run: Path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = vaescale("sync", run, "--to", "wandb", "--json").json
    append_metrics(run, 6, {"train/mse": 0.1})
    second = vaescale("sync", run, "--to", "wandb", "--json").json
    assert (first["rows_sent"], second["rows_sent"]) == (2, 1)
    assert first["run_id"] == second["run_id"] == read_json(run / "synced.json")["wandb"]["id"]


class Recorded(ModuleType):
    """A tracker that records what it gets, as trackio takes it."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.runs: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []

    def init(self, *, auto_log_cpu: bool | None = None, **given: Any) -> None:
        print("* Created new run")  # noqa: T201  # as trackio does, on stdout
        assert auto_log_cpu is False, "the load of the machine that sends"
        self.runs.append(given)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == 5:
            raise OSError("away")
        self.rows.append((step, metrics))

    def finish(self) -> None:
        pass


def test_an_interrupted_drain_goes_on_where_it_stopped(vaescale, run: Path, monkeypatch) -> None:
    """And the newest row of a run that still trains waits for its evaluation."""
    tracker = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    with locked(run):
        assert vaescale("sync", run, "--to", "trackio", "--json").json["rows_sent"] == 1
    append_metrics(run, 5, {"train/mse": 0.1})
    assert vaescale("sync", run, "--to", "trackio").code == 2
    assert [step for step, _ in tracker.rows] == [2, 4]
    assert tracker.rows[-1][1] == {"train/mse": 0.2, "val/mse": 0.3}
    assert json.loads((run / "synced.json").read_text())["trackio"]["step"] == 4
    assert len({one["name"] for one in tracker.runs}) == 1


def test_a_tracker_that_is_not_installed_and_a_run_without_rows_are_named(vaescale, run: Path) -> None:
    for package in ("tensorboard", "wandb", "trackio"):
        try:
            __import__(package)
        except ImportError:
            outcome = vaescale("sync", run, "--to", package)
            assert outcome.code == 2
            assert outcome.err == f"vaescale sync: {package} is not installed; pip install {package}\n"
    (run / "metrics.jsonl").unlink()
    vaescale("sync", run, "--to", "trackio").assert_refused(2, "has no rows in metrics.jsonl yet")
