"""PostgreSQL and an S3 server on this machine's loopback, for tests; both are optional, and `missing()` says what lacks."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mlflow_server import free_port

PASSWORD = "of-a-test"  # noqa: S105
KEYS = {
    "AWS_ACCESS_KEY_ID": "of-a-test",
    "AWS_SECRET_ACCESS_KEY": "of-a-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
START_SECONDS = 60


def missing() -> list[str]:
    """What the machine lacks to run both."""
    modules = {
        "psycopg": "psycopg[binary]",
        "boto3": "boto3",
        "moto": "moto[server]",
        "flask_cors": "moto[server]",
    }
    lacking = {package for name, package in modules.items() if importlib.util.find_spec(name) is None}
    return sorted(lacking | ({"PostgreSQL"} if programs() is None else set()))


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, the newest; Debian keeps it off the PATH."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    return max(
        (one for one in folders if (one / "initdb").is_file()),
        key=lambda one: int(one.parent.name),
        default=None,
    )


def wait_until(is_true: Callable[[], object], *, seconds: float, what: str) -> None:
    """Poll until a condition holds; an error counts as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if is_true():
                return
        except Exception:  # noqa: S110  # the service is not there yet
            pass
        time.sleep(0.1)
    pytest.fail(f"{what} within {seconds:.0f} s")


class Process:
    """A process with its children, in a session of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, words: list[str], log: Path, environment: dict[str, str], **as_user: int | str) -> None:
        assert self._process is None
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words,
                cwd="/",
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
                **as_user,  # type: ignore[call-overload]
            )

    def kill(self) -> None:
        """As a power failure does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Postgres(Process):
    """A PostgreSQL cluster over all its lives. It refuses to run as root, so root runs it as `nobody`."""

    def __init__(self) -> None:
        super().__init__()
        found = programs()
        assert found is not None
        self._programs, self.port = found, free_port()
        self.uri = f"postgresql+psycopg://mlflow@127.0.0.1:{self.port}/postgres"  # the password: PGPASSWORD
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user: dict[str, int | str] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}  # type: ignore[dict-item]
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        words = [
            "--pgdata",
            str(self.folder / "data"),
            "--username",
            "mlflow",
            "--encoding",
            "UTF8",
            "--no-sync",
        ]
        words += ["--auth", "scram-sha-256", "--pwfile", str(password)]
        subprocess.run(
            [str(self._programs / "initdb"), *words],
            check=True,
            capture_output=True,
            cwd="/",
            **self._user,  # type: ignore[call-overload]
        )

    def start(self) -> None:
        """Start it, and wait until it takes a query."""
        words = ["-D", str(self.folder / "data"), "-p", str(self.port)]
        words += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        log = self.folder / "log"
        self._start([str(self._programs / "postgres"), *words], log, {}, **self._user)
        wait_until(
            lambda: self.query("SELECT 1"),
            seconds=START_SECONDS,
            what=f"PostgreSQL did not start, see {log},",
        )

    def query(self, words: str) -> list[tuple[object, ...]]:
        """The rows of a query."""
        import psycopg

        place = f"host=127.0.0.1 port={self.port} user=mlflow dbname=postgres"
        with psycopg.connect(place, password=PASSWORD, connect_timeout=5) as connection:
            return connection.execute(words).fetchall()

    def remove(self) -> None:
        """Kill it and delete its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class S3(Process):
    """moto's S3 server, which keeps its objects in memory: a new life begins with an empty bucket."""

    bucket = "artifacts"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and make the bucket."""
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._start(words, self._folder / "s3.log", {})
        client = self.client()
        wait_until(
            lambda: client.create_bucket(Bucket=self.bucket),
            seconds=START_SECONDS,
            what=f"the S3 server did not start, see {self._folder / 's3.log'},",
        )

    def client(self) -> "object":
        """boto3's client of this server."""
        import boto3
        from botocore.config import Config

        names = {name.lower(): value for name, value in KEYS.items() if "KEY" in name}
        quick = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
        return boto3.client("s3", endpoint_url=self.uri, region_name="us-east-1", config=quick, **names)
