"""MLflow stores that are wrong, lost, moved or half there: said once with the remedy, and nothing of a run waits for it."""

import datetime
import json
import re
import shutil
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.conftest import tiny_recipe
from vaescale.commands.sync import sync as sync_verb
from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.runs import stores, tracking
from vaescale.runs.mlflow import parent_run, stored_runs
from vaescale.runs.mlflow_state import FOLDER_ID, STATE, final_status
from vaescale.runs.sender import cut
from vaescale.runs.store_faults import StoreFault, explained, explained_files
from vaescale.runs.stores import experiment_id, refuse_moved_artifacts
from vaescale.runs.tracking import Drain, TrackingConfig, push, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


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


def make_run(folder: Path) -> Path:
    """A run folder with two rows, a second apart."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\n")
    rows = [{"step": step, "time": 1e9 + step, "train/mse": 1 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(project: Path) -> Path:
    return make_run(project / "runs" / "one")


def client_at(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")


def steps_sent(client: MlflowClient, state: dict[str, Any]) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(state["run_id"], "train/mse"))


def place_artifacts(client: MlflowClient, place: str, name: str = "tests") -> None:
    client.create_experiment(name, artifact_location=place)


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
    go, uploads = threading.Event(), []

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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'boto3'", name="boto3"),
            "(s3://b/x needs boto3); pip install boto3",
        ),
        (OSError("Unable to locate credentials"), "set the credentials of the artifact store"),
        (PermissionError(13, "Permission denied"), "(s3://b/x: Permission denied); make it writable"),
    ],
)
def test_a_missing_way_to_the_files_is_named(error: Exception, message: str) -> None:
    fault = explained_files(error, "s3://b/x")
    assert message in fault.sentence("sqlite:///x.db")
    assert not fault.passes


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


def test_an_experiment_that_another_process_creates_meanwhile_is_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, number = client_at(project), client_at(project).create_experiment("tests")
    real, answers = MlflowClient.get_experiment_by_name, [None]
    monkeypatch.setattr(
        MlflowClient,
        "get_experiment_by_name",
        lambda self, name: answers.pop() if answers else real(self, name),
    )
    assert experiment_id(client, f"sqlite:///{project}/runs/mlflow.db", "tests") == number


# Stores that are none, or of another version


class Wrong(BaseHTTPRequestHandler):
    """Answers by the first part of the path: /403/api/... with 403."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        kind = self.path.split("/")[1]
        body = {
            "401": b"You are not authenticated.",
            "403": b"Invalid Host header - possible DNS rebinding attack detected",
            "200": b"<!doctype html><html><title>Log in</title>" + b"x" * 3000,
        }.get(kind, b"something is wrong")
        self.send_response(int(kind) if kind.isdecimal() else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate that nobody has signed, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(begin).not_valid_after(begin.replace(year=2100))
    pem = serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.sign(key, hashes.SHA256()).public_bytes(pem)
    )
    return path


@pytest.fixture(scope="module")
def wrong_server(certificate: Path) -> Iterator[Callable[[str], str]]:
    """Returns the URI of a kind of fault: a status, `tls` (untrusted) or `no-tls` (https where http is spoken)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as plain,
        ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as tls,
    ):
        tls.socket = context.wrap_socket(tls.socket, server_side=True)
        tls.handle_error = lambda *_: None
        for server in (plain, tls):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hosts = {
            "tls": f"https://127.0.0.1:{tls.server_port}",
            "no-tls": f"https://127.0.0.1:{plain.server_port}",
        }
        yield lambda kind: hosts.get(kind, f"http://127.0.0.1:{plain.server_port}/{kind}")
        for server in (plain, tls):
            server.shutdown()


WRONG = {
    "401": (r"wants a login \(401\); set MLFLOW_TRACKING_USERNAME", False),
    "403": (
        r"refuses the host name 127.0.0.1:\d+ \(403\); start it by `mlflow server --allowed-hosts 127",
        False,
    ),
    "200": ("a web page answers, 'Log in', not MLflow; check the address", False),
    "404": (r"nothing of MLflow is at this address \(404\)", False),
    "tls": (
        r"certificate is not trusted \(self-signed certificate\); .*MLFLOW_TRACKING_SERVER_CERT_PATH",
        False,
    ),
    "no-tls": (r"does not speak TLS \(WRONG_VERSION_NUMBER\); check https://", False),
    "503": ("does not answer", True),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_server_is_one_short_sentence_with_the_remedy(
    run: Path, wrong_server: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, (message, passes) = wrong_server(kind), WRONG[kind]
    with pytest.raises(StoreFault) as caught:
        sync(run, TrackingConfig(mlflow=uri))
    sentence = caught.value.sentence(uri)
    assert re.search(message, sentence), sentence
    assert len(sentence) < 400
    assert "\n" not in sentence
    assert caught.value.passes == passes
    with pytest.raises(UserError, match=message):
        stored_runs(uri, "tests", None, most=1)


def test_the_start_of_training_says_what_is_wrong(
    run: Path, wrong_server: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Drain(run, TrackingConfig(mlflow=wrong_server("403")), shown=True, every_seconds=0.01):
        deadline, said = time.monotonic() + 30, ""
        while "Training goes on" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert "--allowed-hosts" in said
    assert "--allowed-hosts" not in capsys.readouterr().err, "not again at the end"


def _of_version(path: Path, version: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [version])
    connection.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0584bdc529eb",
            "by an earlier MLflow than .*; copy the database, then: mlflow db upgrade sqlite:////",
        ),
        ("ffffffffffff", "by a later MLflow than .*; pip install --upgrade mlflow"),
        ("text", "file is not a database; name another file"),
        ("folder", "is a folder; name a file, such as sqlite:///"),
    ],
    ids=["earlier", "later", "text", "folder"],
)
def test_a_database_of_another_kind_is_one_sentence(
    run: Path, project: Path, config: TrackingConfig, content: str, message: str
) -> None:
    path = project / "runs" / "mlflow.db"
    if content in ("text", "folder"):
        path.unlink()
        path.mkdir() if content == "folder" else path.write_text("no database" * 100)
    else:
        _of_version(path, content)
    begun = time.monotonic()
    with pytest.raises(StoreFault, match=message) as caught:
        sync(run, config)
    assert not caught.value.passes
    if content != "folder":
        with pytest.raises(UserError, match=message.replace("sqlite:////", "sqlite:///")):
            stored_runs(config.mlflow or "", "tests", None, most=1)
    assert time.monotonic() - begun < 10, "MLflow would try for a minute"
    assert not list(project.glob("runs/.mlflow.db.lock"))


def test_a_store_to_read_has_the_right_form(project: Path) -> None:
    for store, message in (
        ("./runs", "write sqlite:///runs/mlflow.db"),
        ("sqlite://runs/x.db", "write sqlite:///runs/x.db"),
    ):
        with pytest.raises(UserError, match=f"--store is '{re.escape(store)}'.*{message}"):
            stored_runs(store, "tests", None, most=1)


def test_runs_whose_files_cannot_be_read_are_compared_without_them(
    run: Path,
    project: Path,
    config: TrackingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in (run, make_run(project / "runs" / "two")):
        sync(folder, config)

    def list_artifacts(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'boto3'", name="boto3")

    monkeypatch.setattr(MlflowClient, "list_artifacts", list_artifacts)
    stored = stored_runs(config.mlflow or "", "tests", None, most=9, curves=["train/mse"])
    assert {one.name for one in stored} == {"one", "two"}
    assert all(len(one.curves["train/mse"]) == 2 for one in stored)
    assert capsys.readouterr().err.count("needs boto3; pip install boto3") == 1


def test_one_process_at_a_time_meets_a_store_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes the tables in several steps; one that comes between them takes the database for an outdated one."""
    inside, most, guard = 0, 0, threading.Lock()

    class Client:
        def __init__(self, uri: str) -> None:
            nonlocal inside, most
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            with guard:
                inside -= 1

    monkeypatch.setattr("mlflow.MlflowClient", Client)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    threads = [threading.Thread(target=stores.client_of, args=(uri,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list((tmp_path / "new").iterdir()) == [], "the lock is gone"


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


def test_unknown_faults_are_shown_in_one_line() -> None:
    fault = explained(RuntimeError("what\n  is " + "x" * 1000), "sqlite:///x.db")
    assert fault.reason.startswith("what is xxx")
    assert len(fault.reason) < 310
    assert not fault.passes
