"""Progress reports to a status server that judges them by the rules of Kubeflow Trainer 2.3."""

import datetime
import http.server
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from vaescale.runs import trainer_status
from vaescale.runs.trainer_status import (
    Address,
    ReportFault,
    TrainerStatus,
    post,
    read_address,
    status_report,
)

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/vision/trainjobs/digits/status"
TOKEN = "eyJhbGciOi.eyJpc3MiOi.c2lnbmF0dXJl"  # noqa: S105
INT32 = 2**31 - 1


def fault_of(body: bytes) -> str:
    """Why Trainer's server, or the rules of its TrainJob, would refuse a body. Empty: taken."""
    status = json.loads(body)["trainerStatus"]
    unknown = status.keys() - {
        "progressPercentage",
        "estimatedRemainingSeconds",
        "metrics",
        "lastUpdatedTime",
    }
    if unknown:
        return f"unknown {unknown}"
    for name, most in (("progressPercentage", 100), ("estimatedRemainingSeconds", INT32)):
        value = status.get(name, 0)
        if type(value) is not int or not 0 <= value <= most:
            return f"{name} {value!r}"
    if not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", status.get("lastUpdatedTime", "")
    ):
        return "lastUpdatedTime"
    metrics = status.get("metrics", [])
    if len(metrics) > 256:
        return "too many metrics"
    for metric in metrics:
        if metric.keys() != {"name", "value"} or not all(
            type(text) is str and 1 <= len(text) <= 64 for text in metric.values()
        ):
            return f"metric {metric}"
    return ""


class Server:
    """A status server on this machine: its bodies, its token, and what it answers instead if `answers` says so."""

    def __init__(self, folder: Path) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.token, self.delay, self.redirect = TOKEN, 0.0, ""
        self.ca_file, self.token_file = folder / "ca.crt", folder / "token"
        self.token_file.write_text(TOKEN + "\n")
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(folder, self.ca_file))
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        return {
            "KUBEFLOW_TRAINER_SERVER_URL": f"https://127.0.0.1:{self.port}{PATH}",
            "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(self.ca_file),
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(self.token_file),
        }

    @property
    def address(self) -> Address:
        address = read_address(self.variables)
        assert address is not None
        return address


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self) -> None:
        state = self.server_state
        time.sleep(state.delay)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if state.redirect:
            self.send_response(307)
            self.send_header("Location", state.redirect)
            self.end_headers()
        elif self.path != PATH:
            self._refuse(404, "Not found")
        elif self.headers["Authorization"] != f"Bearer {state.token}":
            self._refuse(403, "Forbidden")
        elif len(body) > 1 << 16:
            self._refuse(413, "Payload too large")
        elif fault := fault_of(body):
            self._refuse(422, fault)
        else:
            state.bodies.append(json.loads(body)["trainerStatus"])
            self._answer(200, json.loads(body))

    def _refuse(self, code: int, message: str) -> None:
        self._answer(code, {"kind": "Status", "status": "Failure", "message": message, "code": code})

    def _answer(self, code: int, content: object) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


def certificate(folder: Path, ca_file: Path) -> tuple[str, str]:
    """A CA of its own, and a certificate of it for 127.0.0.1: the files of certificate and key."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificates")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    made = []
    for subject in ("ca", "server"):
        key = ec.generate_private_key(ec.SECP256R1())
        issuer_key = made[0][0] if made else key
        is_ca = subject == "ca"
        usage = x509.KeyUsage(True, *[False] * 4, is_ca, is_ca, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
            )
        )
        if not is_ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        made.append((key, builder.sign(issuer_key, hashes.SHA256())))
    ca_file.write_bytes(made[0][1].public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(made[1][1].public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        made[1][0].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(folder / "server.crt"), str(folder / "server.key")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    yield made
    made.close()


def reported(server: Server, count: int) -> list[dict[str, Any]]:
    """The bodies, once there are so many."""
    deadline = time.monotonic() + 10
    while len(server.bodies) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.bodies) >= count
    return server.bodies


def values(status: dict[str, Any]) -> dict[str, float]:
    return {metric["name"]: float(metric["value"]) for metric in status["metrics"]}


@pytest.mark.parametrize("done", [0, 1, 199, 200])
def test_a_report_keeps_the_servers_rules(done: int) -> None:
    metrics = {f"train/metric_{number}": 1e-300 / 3 for number in range(300)}
    metrics |= {"n" * 65: 1.0, "": 1.0, "train/inf": float("inf"), "train/nan": float("nan")}
    report = status_report(done, 200, metrics, remaining_seconds=1e30, now=1_800_000_000.25)
    assert fault_of(json.dumps(report).encode()) == ""
    status = report["trainerStatus"]
    assert status["progressPercentage"] == done // 2
    assert status["estimatedRemainingSeconds"] == INT32
    assert status["lastUpdatedTime"] == "2027-01-15T08:00:00Z"
    assert len(status["metrics"]) == 256
    assert not {"", "n" * 65, "train/inf", "train/nan"} & values(status).keys()
    assert "estimatedRemainingSeconds" not in json.dumps(
        status_report(0, 200, {}, remaining_seconds=None, now=0)
    )


def test_the_newest_numbers_are_sent_at_intervals_and_at_the_end(server: Server) -> None:
    with TrainerStatus(server.variables, 100, start=40, shown=True, every_seconds=0.3) as status:
        for done in range(41, 91):
            status.update(done, {"train/mse": done / 1000})
            time.sleep(0.01)
        status.update(90, {"val/mse": 0.5})
        status.update(100, {"train/mse": 0.1})
    bodies = reported(server, 2)
    assert 2 <= len(bodies) <= 5  # of 52 updates in half a second
    assert bodies[-1]["progressPercentage"] == 100
    assert bodies[-1]["estimatedRemainingSeconds"] == 0
    assert values(bodies[-1]) == {"train/mse": 0.1, "val/mse": 0.5}
    # 60 steps at 100 a second
    assert all(0 <= body["estimatedRemainingSeconds"] <= 10 for body in bodies)


def test_a_new_token_is_read_for_each_report(server: Server) -> None:
    report = status_report(1, 2, {}, remaining_seconds=None, now=0)
    post(server.address, report)
    server.token = "another.token.of.the.cluster"  # noqa: S105
    with pytest.raises(ReportFault, match="403 Forbidden, Forbidden"):
        post(server.address, report)
    server.token_file.write_text(server.token)
    post(server.address, report)
    assert len(server.bodies) == 2


def test_the_token_goes_to_no_other_host(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = status_report(1, 2, {}, remaining_seconds=None, now=0)
    assert read_address(server.variables | {"KUBEFLOW_TRAINER_SERVER_URL": "http://127.0.0.1/x"}) is None
    assert "not an https:// address" in capsys.readouterr().err
    assert read_address(server.variables | {"KUBEFLOW_TRAINER_SERVER_TOKEN": ""}) is None
    server.redirect = f"https://127.0.0.1:{server.port}{PATH}"
    with pytest.raises(ReportFault, match="307"):
        post(server.address, report)
    server.redirect = ""
    (tmp_path / "elsewhere").mkdir()
    certificate(tmp_path / "elsewhere", tmp_path / "other.crt")  # a CA that did not sign the server
    with pytest.raises(ReportFault, match=r"certificate verify failed|self.signed"):
        post(server.address._replace(ca_file=str(tmp_path / "other.crt")), report)
    assert server.bodies == []


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"line\nbreak", b"\xff\xfe"])
def test_a_file_without_a_token_is_named_and_not_quoted(server: Server, content: bytes) -> None:
    server.token_file.write_bytes(content)
    with pytest.raises(ReportFault, match="token") as fault:
        post(server.address, {})
    assert "words" not in str(fault.value)
    server.token_file.unlink()
    with pytest.raises(ReportFault, match="No such file"):
        post(server.address, {})


Write, Run = Callable[[dict[str, Any]], str], Callable[..., Outcome]


def test_training_reports_its_progress(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    recipe_content: dict[str, Any],
    recipe_file: Write,
    vaescale: Run,
) -> None:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert "status server" not in outcome.err
    last = reported(server, 1)[-1]
    assert last["progressPercentage"] == 100
    names = values(last).keys()
    assert {"train/neg_elbo_nats", "train/sigma", "val/neg_elbo_nats"} <= names


@pytest.mark.parametrize("trouble", ["down", "forbidden", "slow"])
def test_training_goes_on_without_the_server(
    trouble: str,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    recipe_content: dict[str, Any],
    recipe_file: Write,
    vaescale: Run,
) -> None:
    monkeypatch.setattr(trainer_status, "TIMEOUT_SECONDS", 1.0)
    variables = server.variables
    expected = {"down": "Connection refused", "forbidden": "403 Forbidden", "slow": "timed out"}[trouble]
    if trouble == "down":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        variables["KUBEFLOW_TRAINER_SERVER_URL"] = f"https://127.0.0.1:{port}{PATH}"
    elif trouble == "forbidden":
        server.token = "of.another.job"  # noqa: S105
    else:
        server.delay = 30
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe_content["training"] |= {"evaluate_every": 12, "checkpoint_every": 12}
    outcome = vaescale("train", recipe_file(recipe_content))
    assert outcome.code == 0, outcome.err
    assert server.bodies == []
    said = [line for line in outcome.err.splitlines() if "status server" in line]
    assert len(said) == 1, outcome.err
    assert expected in said[0]
    assert TOKEN not in outcome.err
