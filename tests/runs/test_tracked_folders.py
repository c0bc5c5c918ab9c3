"""Run folders and what MLflow has of them: files that do not arrive, deleted runs, moved and copied folders, killed runs."""

import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.conftest import tiny_recipe
from tests.runs.tracked import client_at, make_run, place_artifacts, steps_sent
from vaescale.commands.sync import sync as sync_verb
from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.runs import tracking
from vaescale.runs.mlflow import parent_run, stored_runs
from vaescale.runs.mlflow_state import FOLDER_ID, STATE, final_status
from vaescale.runs.sender import cut
from vaescale.runs.store_faults import StoreFault
from vaescale.runs.stores import refuse_moved_artifacts
from vaescale.runs.tracking import Drain, TrackingConfig, push, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


# Artifacts that do not arrive


def test_rows_and_status_do_not_wait_for_files(
    run: Path, project: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_at(project)
    place_artifacts(client, "file:///proc/nowhere")
    sent: list[int] = []
    real = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **options: Any) -> None:
        sent.extend(metric.step for metric in metrics)
        real(self, run_id, metrics=metrics, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    for _ in range(2):
        with pytest.raises(StoreFault, match=r"nowhere/.*No such file.*choose another tracking\.experiment"):
            sync(run, config, status="FINISHED")
    stored = client.get_run(run_folder.read_json(run / STATE)["run_id"])
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics == {"train/mse": 0.5}
    assert stored.data.params == {"name": "one"}
    assert sent == [1, 2], "once"


def test_a_kind_that_fails_keeps_no_other_back(
    run: Path, project: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no tags today")

    run_folder.write_json(run / "run.json", {"changes": [{"step": 1, "changes": ["a"]}]})
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_tag", refuse)
        with pytest.raises(StoreFault, match="no tags today"):
            sync(run, config, status="FINISHED")
    state = run_folder.read_json(run / STATE)
    assert state["status_sent"]
    assert set(state["artifacts"]) == {"recipe.yaml"}
    assert steps_sent(client_at(project), state) == [1, 2]
    assert "changes" in client_at(project).get_run(sync(run, config)["run_id"]).data.tags


def test_a_file_that_takes_long_is_sent_beside_the_rows(
    run: Path, project: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, uploads, waits = threading.Event(), [], []
    join = threading.Thread.join

    def wait(self: threading.Thread, seconds: float | None = None) -> None:
        waits.append(seconds)
        join(self, seconds)

    monkeypatch.setattr("vaescale.runs.sender._Upload.join", wait)

    def log_artifact(self: MlflowClient, run_id: str, path: str, parent: str | None = None) -> None:
        uploads.append(Path(path).name)
        assert go.wait(30)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    for step in (3, 4):
        with pytest.raises(StoreFault, match=r"no answer for recipe\.yaml"):
            sync(run, config, status="FINISHED", upload_seconds=0.05)
        state = run_folder.read_json(run / STATE)
        assert state["status_sent"]
        assert max(steps_sent(client_at(project), state)) == step - 1
        run_folder.append_metrics(run, step, {"train/mse": 0.1})
    assert waits[0] == pytest.approx(0.05, abs=0.05)
    assert waits[1] == 0.0, "it was waited for"
    go.set()
    assert sync(run, config)["artifacts_sent"] == 1
    assert uploads == ["recipe.yaml"], "once"


def test_a_store_s_fault_is_said_once(
    run: Path, project: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    place_artifacts(client_at(project), "file:///proc/nowhere")
    with Drain(run, config, shown=True, every_seconds=0.01):
        deadline = time.monotonic() + 30
        while run.absolute() not in tracking._told and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # further rounds
    for _ in range(2):
        push(run, config)
    said = capsys.readouterr().err
    assert said.count("does not get the run's files") == said.count("No such file") == 1
    assert said.count("is behind, as said before") == 1
    assert "Training goes on" in said


# Runs and experiments that were deleted


def test_a_deleted_run_is_sent_again_as_a_new_one(
    run: Path, project: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    client, first = client_at(project), sync(run, config, status="FINISHED")
    client.delete_run(first["run_id"])
    second = sync(run, config)
    assert second["metrics_sent"] == 2
    stored = client.get_run(second["run_id"])
    assert stored.data.tags["vaescale.replaces"] == first["run_id"]
    assert stored.info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(second["run_id"])] == ["recipe.yaml"]
    assert f"the MLflow run {first['run_id']} of {run} was deleted; a new run" in capsys.readouterr().err
    assert sync(run, config)["run_id"] == second["run_id"]


def test_a_run_that_is_deleted_while_it_is_sent_is_made_anew_at_once(
    run: Path, project: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, first, known = client_at(project), sync(run, config), tracking._known_run

    def known_and_then_deleted(*arguments: Any) -> Any:
        found = known(*arguments)
        if found is not None and found.info.run_id == first["run_id"]:
            client.delete_run(first["run_id"])
        return found

    monkeypatch.setattr(tracking, "_known_run", known_and_then_deleted)
    run_folder.append_metrics(run, 3, {"train/mse": 0.1})
    second = sync(run, config, status="FINISHED")
    assert second["run_id"] != first["run_id"]
    assert steps_sent(client, second) == [1, 2, 3]
    assert client.get_run(second["run_id"]).info.status == "FINISHED"


def test_a_deleted_experiment_is_one_sentence_with_the_remedy(
    run: Path, project: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    client, first = client_at(project), sync(run, config)
    client.delete_experiment(first["experiment_id"])
    run_folder.append_metrics(run, 3, {"train/mse": 0.1})
    other = make_run(project / "runs" / "two")
    for folder in (run, other):
        with pytest.raises(StoreFault) as caught:
            sync(folder, config)
        assert f"restore --experiment-id {first['experiment_id']}" in str(caught.value)
        assert not caught.value.passes
    with pytest.raises(UserError, match="'tests' was deleted"):
        stored_runs(config.mlflow or "", "tests", None, most=1)
    assert parent_run(config.mlflow, "tests", "sweep") is None
    assert "'tests' was deleted; choose another tracking.experiment, or restore it" in capsys.readouterr().err
    client.restore_experiment(first["experiment_id"])
    assert sync(run, config)["run_id"] == first["run_id"]
    assert steps_sent(client, first) == [1, 2, 3]


# Folders that were moved or copied


def test_a_copy_becomes_its_own_run_and_says_so(
    run: Path, project: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sync(run, config, status="FINISHED")
    copy = Path(shutil.copytree(run, project / "runs" / "copy"))
    run_folder.append_metrics(copy, 3, {"train/mse": 0.1})
    second = sync(copy, config)
    assert f"{copy} is a copy of {run}: in MLflow it becomes a run of its own" in capsys.readouterr().err
    client = client_at(project)
    assert (steps_sent(client, first), steps_sent(client, second)) == ([1, 2], [1, 2, 3])
    tags = client.get_run(second["run_id"]).data.tags
    assert tags["vaescale.copied_from"] == first["run_id"]
    assert tags[FOLDER_ID] == run_folder.read_json(copy / STATE)["folder_id"] != first["folder_id"]
    assert client.get_run(second["run_id"]).info.status == "FINISHED"
    for folder, state in ((run, first), (copy, second)):
        assert sync(folder, config)["run_id"] == state["run_id"], "and stays so"


def test_a_moved_folder_keeps_its_run_and_its_relative_store(
    run: Path, project: Path, tmp_path: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sync(run, config)
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    run_folder.append_metrics(moved, 3, {"train/mse": 0.1})
    assert sync(moved, config)["run_id"] == first["run_id"]
    assert steps_sent(client_at(project), first) == [1, 2, 3]
    assert not (tmp_path / "runs").exists(), "no second store"
    assert len(client_at(project).search_runs([first["experiment_id"]])) == 1


def test_a_run_that_met_no_store_yet_knows_its_project(
    run: Path, project: Path, tmp_path: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_run(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_run", create_run)
        push(run, config, status="FINISHED")
    monkeypatch.chdir(tmp_path)
    state = sync(run, config)
    assert client_at(project).get_run(state["run_id"]).info.status == "FINISHED"


def test_a_moved_project_uses_its_own_store_and_no_earlier_place(
    run: Path, project: Path, tmp_path: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sync(run, config)
    moved = Path(shutil.move(project, tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    run = moved / "runs" / "one"
    run_folder.append_metrics(run, 3, {"train/mse": 0.1})
    (run / "summary.json").write_text("{}")
    with pytest.raises(StoreFault, match="the store came from file://") as caught:
        sync(run, config)
    assert not project.exists(), "no artifact is written to the earlier place"
    client = client_at(moved)
    assert steps_sent(client, first) == [1, 2, 3]
    _, command = caught.value.remedy.split(' "')
    with sqlite3.connect(moved / "runs" / "mlflow.db") as connection:
        connection.executescript(command.rstrip('"'))
    connection.close()
    stored = client.get_run(first["run_id"])
    assert stored.info.artifact_uri == (moved / f"runs/mlartifacts/{first['run_id']}/artifacts").as_uri()
    refuse_moved_artifacts(
        client, f"sqlite:///{moved}/runs/mlflow.db", stored
    )  # MLflow caches the place in this process


def test_of_two_copies_on_two_machines_the_last_one_to_move_keeps_the_run(
    run: Path, project: Path, tmp_path: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sync(run, config)
    before = (run / STATE).read_bytes()
    moved = Path(shutil.move(run, project / "runs" / "moved"))  # as the other machine sees it
    assert sync(moved, config)["run_id"] == first["run_id"]
    shutil.rmtree(moved)
    make_run(run)
    (run / STATE).write_bytes(before)
    assert sync(run, config)["run_id"] != first["run_id"]
    assert "belongs to another copy of the folder" in capsys.readouterr().err


# The status of a run that was killed


@pytest.mark.parametrize(
    ("stopped", "trained", "recorded", "expected"),
    [
        (None, False, "RUNNING", "KILLED"),
        (None, False, None, "KILLED"),
        (75, False, "RUNNING", "KILLED"),
        (130, False, "RUNNING", "KILLED"),
        (3, False, "RUNNING", "FAILED"),
        (1, False, "RUNNING", "FAILED"),
        (None, True, "RUNNING", "FINISHED"),
        (2, True, "RUNNING", "FINISHED"),  # a later start was refused
        (None, False, "FAILED", None),
    ],
)
def test_the_status_is_what_the_folder_tells(
    run: Path, stopped: int | None, trained: bool, recorded: str | None, expected: str | None
) -> None:
    if stopped is not None:
        run_folder.write_json(run / "stopped.json", {"exit_code": stopped})
    if trained:
        run_folder.update_summary(run, "train", {"step": 2})
    if recorded:
        run_folder.write_json(run / STATE, {"status": recorded})
    assert final_status(run, 2) == (expected, None if expected is None else 1_000_000_002_000)
    with run_folder.locked(run):
        assert final_status(run, 2) == (None, None), "it trains now"


def test_sync_ends_a_killed_run_at_its_last_row(run: Path, project: Path, config: TrackingConfig) -> None:
    state = sync(run, config, status="RUNNING")
    write_recipe(run, config)
    (run / "lock").write_text('{"host": "here", "pid": 1}')  # left by the killed process
    assert sync_verb(run)["run_id"] == state["run_id"]
    info = client_at(project).get_run(state["run_id"]).info
    assert info.status == "KILLED"
    assert (info.start_time, info.end_time) == (1_000_000_001_000, 1_000_000_002_000)


def write_recipe(run: Path, config: TrackingConfig) -> None:
    """A whole recipe, as the verb reads it."""
    recipe = {**tiny_recipe(Path("data"), run), "tracking": config.model_dump()}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(("passes", "message"), [(True, "; try again later"), (False, "")])
def test_sync_says_try_again_only_of_what_passes(
    run: Path,
    config: TrackingConfig,
    monkeypatch: pytest.MonkeyPatch,
    passes: bool,
    message: str,
) -> None:
    write_recipe(run, config)

    def create_run(*_: object, **__: object) -> None:
        raise ConnectionError("gone") if passes else ValueError("gone")

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    with pytest.raises(UserError) as caught:
        sync_verb(run)
    assert ("try again" in str(caught.value)) == passes
    assert str(caught.value).endswith(message)


# Values that are cut


def test_a_value_that_is_cut_says_so(run: Path, project: Path, config: TrackingConfig) -> None:
    text = "x" * 7000
    (run / "recipe.yaml").write_text(f"name: one\nnote: {text}\n")
    run_folder.write_json(run / "run.json", {"long": text, "changes": [{"step": 1, "changes": [text]}]})
    stored = client_at(project).get_run(sync(run, config)["run_id"]).data
    assert len(stored.params["note"]) == 6000
    assert stored.params["note"].endswith("x... [cut: 7000 characters; whole in recipe.yaml]")
    for name in ("long", "changes"):
        assert len(stored.tags[name]) == 5000
        assert stored.tags[name].endswith("characters; whole in run.json]")
    assert cut("abc", 3, whole="recipe.yaml") == "abc"
