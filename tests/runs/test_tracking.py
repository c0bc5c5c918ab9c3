"""Tracking against a real MLflow store in SQLite: everything arrives once, and an absent server stops nothing."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.runs import sender, tracking
from vaescale.runs.mlflow_state import STATE
from vaescale.runs.store_faults import StoreFault
from vaescale.runs.stores import experiment_id
from vaescale.runs.tracking import Drain, TrackingConfig, push, sync
from vaescale.system.files import exclusive

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "digits-optimal"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "digits-optimal", "optimizer": {"lr": 0.1, "kind": "adam"}})
    )
    run_folder.write_json(folder / "run.json", {"git_revision": "abc", "world_size": 2})
    run_folder.append_metrics(folder, 1, {"train/mse": 0.5})
    return folder


@pytest.fixture
def config(tmp_path: Path, empty_store: Path) -> TrackingConfig:
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store" / "mlflow.db")
    return TrackingConfig(mlflow=f"sqlite:///{tmp_path}/store/mlflow.db", experiment="tests")


def history(config: TrackingConfig, state: dict, name: str) -> list[tuple[int, float]]:
    rows = MlflowClient(config.mlflow).get_metric_history(state["run_id"], name)
    return sorted((row.step, row.value) for row in rows)


def test_everything_arrives_once(run: Path, config: TrackingConfig) -> None:
    (run / "figures").mkdir()
    (run / "figures" / "curves.png").write_bytes(b"png")
    sync(run, config, status="RUNNING")
    run_folder.append_metrics(run, 2, {"train/mse": 0.25, "val/mse": 1.0})
    sync(run, config, status="FINISHED")
    state = sync(run, config)
    client = MlflowClient(config.mlflow)
    mlflow_run = client.get_run(state["run_id"])
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.info.run_name == "digits-optimal"
    assert mlflow_run.data.params == {
        "name": "digits-optimal",
        "optimizer.lr": "0.1",
        "optimizer.kind": "adam",
    }
    assert {"git_revision": "abc", "world_size": "2"}.items() <= mlflow_run.data.tags.items()
    assert history(config, state, "train/mse") == [(1, 0.5), (2, 0.25)]
    assert history(config, state, "val/mse") == [(2, 1.0)]
    assert {item.path for item in client.list_artifacts(state["run_id"])} == {"figures", "recipe.yaml"}
    assert len(client.search_runs([state["experiment_id"]])) == 1


@pytest.mark.parametrize(
    "place", ["data/x/train", "https://host/x/train", "s3://bucket/x/train", "a/x + b/y"]
)
def test_mlflow_finds_the_data_set_s_source(run: Path, config: TrackingConfig, place: str) -> None:
    import mlflow

    sets = "[{path: a/x, weight: 1}, {path: b/y, weight: 2}, {path: c/z, weight: 0}]"
    train = sets if "+" in place else f"'{place}'"
    (run / "recipe.yaml").write_text(f"name: run\ndata: {{train: {train}}}\n")
    run_folder.write_json(run / "run.json", {"data_hash": "abc"})
    state = sync(run, config)
    (used,) = MlflowClient(config.mlflow).get_run(state["run_id"]).inputs.dataset_inputs
    assert used.dataset.digest == "abc"
    assert place in mlflow.data.get_source(used.dataset).to_json()


def test_mlflow_knows_where_a_run_comes_from(run: Path, config: TrackingConfig, monkeypatch) -> None:
    monkeypatch.setenv("LOGNAME", "someone")
    run_folder.write_json(run / "run.json", {"git_revision": "0123456789abcdef-dirty"})
    stored = MlflowClient(config.mlflow).get_run(sync(run, config)["run_id"])
    assert stored.data.tags["mlflow.source.name"] == "vaescale train"
    assert stored.data.tags["mlflow.source.git.commit"] == "0123456789abcdef"
    assert stored.data.tags["mlflow.user"] == stored.info.user_id == "someone"


def test_a_file_is_hashed_again_when_it_changed(run: Path, config: TrackingConfig, monkeypatch) -> None:
    (run / "summary.json").write_text("{}")
    assert sync(run, config)["artifacts_sent"] == 2
    with monkeypatch.context() as patched:
        patched.setattr("vaescale.runs.sender.hashlib.sha256", None)
        assert sync(run, config)["artifacts_sent"] == 0
    (run / "summary.json").write_text('{"a": 1}')
    assert sync(run, config)["artifacts_sent"] == 1
    os.utime(run / "summary.json", ns=(1, 1))
    assert sync(run, config)["artifacts_sent"] == 0, "its content is the same"


def test_replayed_steps_are_not_sent_again(run: Path, config: TrackingConfig) -> None:
    run_folder.append_metrics(run, 2, {"train/mse": 0.25})
    sync(run, config)
    for step, value in ((2, 0.25), (3, 0.125)):  # resumed from step 1
        run_folder.append_metrics(run, step, {"train/mse": value})
    state = sync(run, config)
    assert history(config, state, "train/mse") == [(1, 0.5), (2, 0.25), (3, 0.125)]


def test_what_follows_a_rollback_is_sent(run: Path, config: TrackingConfig) -> None:
    run_folder.append_metrics(run, 2, {"train/mse": 9e9})
    sync(run, config)
    run_folder.append_metrics(run, 1, {run_folder.ROLLBACK: 0.5})
    time.sleep(0.01)
    run_folder.append_metrics(run, 2, {"train/mse": 0.25})
    state = sync(run, config)
    assert history(config, state, "train/mse") == [(1, 0.5), (2, 0.25), (2, 9e9)]
    assert run_folder.read_metrics(run)[-1]["train/mse"] == 0.25


def test_changes_are_a_tag_and_what_was_sent_is_counted(run: Path, config: TrackingConfig) -> None:
    first = sync(run, config)
    assert (first["metrics_sent"], first["artifacts_sent"]) == (1, 1)
    tags = run_folder.read_json(run / "run.json")
    run_folder.write_json(
        run / "run.json", tags | {"changes": [{"step": 1, "changes": ["optimizer.lr: 1 -> 2"]}]}
    )
    again = sync(run, config)
    assert (again["metrics_sent"], again["artifacts_sent"]) == (0, 0)
    stored = MlflowClient(config.mlflow).get_run(again["run_id"]).data.tags["changes"]
    assert json.loads(stored)[0]["changes"] == ["optimizer.lr: 1 -> 2"]


def test_a_half_written_line_waits_for_its_end(run: Path, config: TrackingConfig) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 0, "trai')
    sync(run, config)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('n/mse": 0.25}\n')
    assert history(config, sync(run, config), "train/mse") == [(1, 0.5), (2, 0.25)]


def test_a_changed_figure_is_sent_again(run: Path, config: TrackingConfig, monkeypatch) -> None:
    sent: list[str] = []

    def note(self, run_id, path, place=None):
        sent.append((Path(path).name, place))

    monkeypatch.setattr(MlflowClient, "log_artifact", note)
    sync(run, config)
    (run / "recipe.yaml").write_text("name: b\n")
    sync(run, config)
    sync(run, config)
    assert sent == [("recipe.yaml", None)] * 2


def test_the_drain_sends_in_the_background_and_finishes(run: Path, config: TrackingConfig) -> None:
    with Drain(run, config, shown=True, every_seconds=0.05):
        for step in range(2, 6):
            run_folder.append_metrics(run, step, {"train/mse": 1 / step})
    state = run_folder.read_json(run / STATE)
    assert [step for step, _ in history(config, state, "train/mse")] == [1, 2, 3, 4, 5]
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == "FINISHED"


def test_a_failed_run_is_marked(run: Path, config: TrackingConfig) -> None:
    with pytest.raises(ZeroDivisionError), Drain(run, config, shown=True):
        raise ZeroDivisionError
    state = run_folder.read_json(run / STATE)
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == "FAILED"


def test_an_absent_server_stops_nothing(run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = TrackingConfig(mlflow="http://127.0.0.1:9", experiment="tests")
    with Drain(run, away, shown=True, every_seconds=0.05, patience=30):
        run_folder.append_metrics(run, 2, {"train/mse": 0.25})
    push(run, away)
    words = capsys.readouterr().err
    assert words.count("is behind") == words.count("vaescale sync") == 1, "said once"
    assert len(run_folder.read_metrics(run)) == 2


def test_none_means_none(run: Path) -> None:
    with Drain(run, TrackingConfig(mlflow=None), shown=True):
        pass
    push(run, TrackingConfig(mlflow=None))
    assert not (run / STATE).exists()


def test_rows_lost_by_a_crash_in_the_middle_are_sent_again(
    run: Path, config: TrackingConfig, monkeypatch
) -> None:
    """MLflow raises in the second request: the next sync must bring what the first call did not record."""
    monkeypatch.setattr(sender, "BATCH_METRICS", 2)
    for step in range(2, 6):
        run_folder.append_metrics(run, step, {"train/mse": 1 / step})
    real, calls = MlflowClient.log_batch, []

    def failing(self, *arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise ConnectionError("gone")
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    with pytest.raises(StoreFault, match="gone"):
        sync(run, config)
    state = sync(run, config)
    assert [step for step, _ in history(config, state, "train/mse")] == [1, 2, 3, 4, 5]


def test_a_run_without_metrics_is_closed(run: Path, config: TrackingConfig) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ZeroDivisionError), Drain(run, config, shown=True):
        raise ZeroDivisionError
    state = run_folder.read_json(run / STATE)
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == "FAILED"
    sync(run, config)  # as `vaescale evaluate` does: the status is the training's
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == "FAILED"


def test_a_server_that_fails_early_leaves_one_run(run: Path, config: TrackingConfig, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone"))
        )
        for _ in range(3):
            with pytest.raises(StoreFault, match="gone"):
                sync(run, config)
    state = sync(run, config)
    client = MlflowClient(config.mlflow)
    assert len(client.search_runs([state["experiment_id"]])) == 1
    assert client.get_run(state["run_id"]).data.params["optimizer.lr"] == "0.1"


def test_a_cut_line_is_mended_and_passed_over(run: Path, config: TrackingConfig) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    run_folder.mend_metrics(run)
    run_folder.mend_metrics(run)
    run_folder.append_metrics(run, 3, {"train/mse": 0.25})
    assert history(config, sync(run, config), "train/mse") == [(1, 0.5), (3, 0.25)]
    assert [row["step"] for row in run_folder.read_metrics(run)] == [1, 3]


def test_a_second_fit_is_sent_too(run: Path, config: TrackingConfig) -> None:
    for value in (1.0, 2.0):
        run_folder.append_metrics(run, 5, {"gmm/val_log_density_nats": value})
        time.sleep(0.01)  # MLflow tells values of one step apart by their milliseconds
        state = sync(run, config)
    assert history(config, state, "gmm/val_log_density_nats") == [(5, 1.0), (5, 2.0)]


def test_a_deleted_or_changed_store_gets_a_new_run(run: Path, config: TrackingConfig, tmp_path: Path) -> None:
    sync(run, config)
    shutil.rmtree(tmp_path / "store")
    state = sync(
        run, TrackingConfig(mlflow=config.mlflow.replace("mlflow.db", "other.db"), experiment="tests")
    )
    assert "other.db" in state["tracking_uri"]
    assert MlflowClient(state["tracking_uri"]).get_run(state["run_id"]).data.metrics == {"train/mse": 0.5}


def test_metrics_survive_a_crash_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "a": 1}\n{"step": 1, "a": 0}\n{"step": 2, "a": 3}\n{"st'
    )
    assert run_folder.read_metrics(tmp_path) == [{"step": 1, "a": 0}, {"step": 2, "a": 3}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["a"] == 1


# A store in SQLite drops a value that it has already, with its step and time. What was sent is therefore counted here.
def count_sent(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[tuple[str, int]]:
    """The name and step of every value that goes to MLflow, each request delayed."""
    sent: list[tuple[str, int]] = []
    real = MlflowClient.log_batch

    def log_batch(self, run_id, metrics=(), **options):
        sent.extend((metric.key, metric.step) for metric in metrics)
        time.sleep(seconds)
        return real(self, run_id, metrics=metrics, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return sent


def test_the_drain_and_a_push_of_one_process_send_each_value_once(
    run: Path, config: TrackingConfig, monkeypatch
) -> None:
    sent = count_sent(monkeypatch, 0.05)
    with Drain(run, config, shown=True, every_seconds=0.01):
        for step in range(2, 12):
            run_folder.append_metrics(run, step, {"train/mse": 1 / step})
            push(run, config)
    state = run_folder.read_json(run / STATE)
    client = MlflowClient(config.mlflow)
    assert len(client.search_runs([state["experiment_id"]])) == 1
    assert history(config, state, "train/mse") == [
        (step, 1 / step if step > 1 else 0.5) for step in range(1, 12)
    ]
    assert sorted(sent) == [("train/mse", step) for step in range(1, 12)]


def _sync_in_process(folder: Path, config: TrackingConfig, name: str, others: int) -> list[tuple[str, int]]:
    """Sync a folder at the same moment as other processes. Returns the values sent from here."""
    (folder.parent / f"ready-{name}").touch()
    with pytest.MonkeyPatch.context() as monkeypatch:
        sent = count_sent(monkeypatch, 0.5)
        while len(list(folder.parent.glob("ready-*"))) < others:
            time.sleep(0.01)
        for _ in range(3):
            sync(folder, config)
    return sent


@pytest.mark.slow
def test_two_processes_send_each_value_once(run: Path, config: TrackingConfig) -> None:
    sync(run, config)  # or the two would make the store's tables at once
    steps = range(2, 400)
    for step in steps:
        run_folder.append_metrics(run, step, {"train/mse": 1 / step, "val/mse": 2.0})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(_sync_in_process, run, config, name, 2) for name in "ab"]
        sent = Counter(value for future in futures for value in future.result())
    assert set(sent.values()) == {1}
    assert sent.keys() == {(name, step) for name in ("train/mse", "val/mse") for step in steps}
    state = run_folder.read_json(run / STATE)
    assert history(config, state, "val/mse") == [(step, 2.0) for step in steps]
    assert state["sent_bytes"] == (run / "metrics.jsonl").stat().st_size


def test_two_first_senders_make_one_run(run: Path, config: TrackingConfig, monkeypatch) -> None:
    real = MlflowClient.create_run

    def create_run(self, *arguments, **options):
        time.sleep(0.3)
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    experiment_id(MlflowClient(config.mlflow), config.mlflow, config.experiment)
    threads = [threading.Thread(target=push, args=(run, config)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = run_folder.read_json(run / STATE)
    assert len(MlflowClient(config.mlflow).search_runs([state["experiment_id"]])) == 1


def test_what_was_sent_is_recorded_when_a_later_request_fails(
    run: Path, config: TrackingConfig, monkeypatch
) -> None:
    sent = count_sent(monkeypatch)
    real = MlflowClient.log_artifact

    def log_artifact(self, run_id, path, place=None):
        if Path(path).name == "summary.json":
            raise ConnectionError("gone")
        artifacts.append(Path(path).name)
        return real(self, run_id, path, place)

    artifacts: list[str] = []
    (run / "summary.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", log_artifact)
        for _ in range(2):
            with pytest.raises(StoreFault, match="gone"):
                sync(run, config)
    assert (sent, artifacts) == ([("train/mse", 1)], ["recipe.yaml"])
    assert sync(run, config)["artifacts_sent"] == 1
    assert sent == [("train/mse", 1)]


def test_requests_before_one_that_fails_are_not_sent_again(
    run: Path, config: TrackingConfig, monkeypatch
) -> None:
    monkeypatch.setattr(sender, "BATCH_METRICS", 2)
    sync(run, config)
    for step in range(2, 7):
        run_folder.append_metrics(run, step, {"train/mse": 1 / step})
    sent = count_sent(monkeypatch)
    counting = MlflowClient.log_batch

    def failing(self, run_id, metrics=(), **options):
        if any(metric.step == 4 for metric in metrics):
            raise ConnectionError("gone")
        return counting(self, run_id, metrics=metrics, **options)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", failing)
        with pytest.raises(StoreFault, match="gone"):
            sync(run, config)
    assert sync(run, config)["metrics_sent"] == 3
    assert sent == [("train/mse", step) for step in range(2, 7)]


def test_a_sender_waits_for_another_and_then_names_the_remedy(
    run: Path, config: TrackingConfig, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(tracking, "WAIT_SECONDS", 0.2)
    with exclusive(run / tracking.LOCK):
        push(run, config)
        words = capsys.readouterr().err
        assert words.count("\n") == words.count("vaescale sync") == 1
        assert "another process sends" in words
        with pytest.raises(UserError, match="another thread of this process"):
            sync(run, config, wait_seconds=0.0)
    assert not (run / STATE).exists()
    assert sync(run, config)["metrics_sent"] == 1


def test_the_sync_verb_names_the_remedy(
    run: Path, config: TrackingConfig, monkeypatch, vaescale, recipe_content
) -> None:
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_content | {"tracking": {"mlflow": config.mlflow}}))
    monkeypatch.setitem(tracking.sync.__kwdefaults__, "wait_seconds", 0.0)
    with exclusive(run / tracking.LOCK):
        outcome = vaescale("sync", str(run))
    outcome.assert_refused(2, "another process sends", f"when it has ended: `vaescale sync {run}`")
    assert "does not answer" not in outcome.err


def test_the_drain_skips_rounds_while_another_sends(run: Path, config: TrackingConfig, capsys) -> None:
    drain = Drain(run, config, shown=True, every_seconds=0.02)
    with drain, exclusive(run / tracking.LOCK, wait_seconds=30):
        before = run_folder.read_json(run / STATE)
        begun = time.perf_counter()
        for step in range(2, 6):
            run_folder.append_metrics(run, step, {"train/mse": 1 / step})
        assert time.perf_counter() - begun < 5, "no step waits"
        time.sleep(0.3)
        assert run_folder.read_json(run / STATE) == before
    state = run_folder.read_json(run / STATE)
    assert [step for step, _ in history(config, state, "train/mse")] == [1, 2, 3, 4, 5]
    assert "behind" not in capsys.readouterr().err


def test_a_status_outlives_an_absent_server_and_a_deleted_store(
    run: Path, config: TrackingConfig, monkeypatch, tmp_path: Path, empty_store: Path
) -> None:
    sync(run, config, status="RUNNING")
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "get_run", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        push(run, config, status="FINISHED")
    state = sync(run, config)
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == "FINISHED"
    shutil.copy(empty_store, tmp_path / "other.db")
    other = TrackingConfig(mlflow=f"sqlite:///{tmp_path}/other.db", experiment="tests")
    state = sync(run, other)
    assert MlflowClient(other.mlflow).get_run(state["run_id"]).info.status == "FINISHED"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_status_outlives_a_store_that_never_answered(
    run: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    def create_run(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_run", create_run)
        for wished in ("RUNNING", status):
            push(run, config, status=wished)
    assert "run_id" not in run_folder.read_json(run / STATE)
    state = sync(run, config)
    assert MlflowClient(config.mlflow).get_run(state["run_id"]).info.status == status


def test_temporary_files_are_never_sent(run: Path, config: TrackingConfig) -> None:
    for name in ("gmm/.mixture.json.tmp-1-2-3", "gmm/components-3/.lock", "gmm/mixture.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    assert set(sync(run, config)["artifacts"]) == {"recipe.yaml", "gmm/mixture.json"}


@pytest.mark.parametrize("moment", ["before its size is read", "before it is read", "before it is sent"])
def test_a_file_that_vanishes_is_skipped(
    run: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A second fit replaces the mixtures while the first one's are sent."""
    (run / "gmm").mkdir()
    vanishing = run / "gmm" / "mixture.json"
    vanishing.write_text("{}")
    owner, name = {
        "before its size is read": (Path, "stat"),
        "before it is read": (Path, "read_bytes"),
        "before it is sent": (MlflowClient, "log_artifact"),
    }[moment]
    real = getattr(owner, name)

    def delete_first(*arguments, **options):
        if str(vanishing) in map(str, arguments):
            vanishing.unlink(missing_ok=True)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, delete_first)
    state = sync(run, config, status="FINISHED")
    assert not vanishing.exists()
    assert set(state["artifacts"]) == {"recipe.yaml"}
    assert state["status_sent"], "what follows is sent"


def test_a_push_does_not_wait_for_its_own_process_s_hanging_drain(
    run: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, answer = threading.Event(), threading.Event()
    real = MlflowClient.create_run

    def create_run(self, *arguments, **options):
        asked.set()
        answer.wait(60)
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    monkeypatch.setattr(tracking, "WAIT_SECONDS", 10.0)
    drain = Drain(run, config, shown=True, every_seconds=0.01, patience=1.0)
    try:
        with drain:
            assert asked.wait(30), "the drain is sending"
        begun = time.monotonic()
        push(run, config, status="FINISHED")
        assert time.monotonic() - begun < 5
        messages = capsys.readouterr().err
        assert messages.count("is behind") == messages.count("vaescale sync") == 1, "said once"
        assert "another process" not in messages
    finally:
        answer.set()
        drain._thread.join(30)
    push(run, config)
    assert capsys.readouterr().err == "", "the drain has ended"
