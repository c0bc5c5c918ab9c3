"""MLflow stores that are none, or of another kind or version: one sentence with the remedy, within seconds."""

import datetime
import re
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.runs.tracked import client_at, make_run
from vaescale.errors import UserError
from vaescale.runs import stores
from vaescale.runs.mlflow import stored_runs
from vaescale.runs.store_faults import StoreFault, explained, explained_files
from vaescale.runs.stores import experiment_id
from vaescale.runs.tracking import Drain, TrackingConfig, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


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


def test_unknown_faults_are_shown_in_one_line() -> None:
    fault = explained(RuntimeError("what\n  is " + "x" * 1000), "sqlite:///x.db")
    assert fault.reason.startswith("what is xxx")
    assert len(fault.reason) < 310
    assert not fault.passes
