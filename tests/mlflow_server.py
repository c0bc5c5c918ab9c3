"""`mlflow server` on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


class Server:
    """`mlflow server` on this machine, on one store over all its lives.

    store: a database in place of a file in the folder; words: further options; environment: further variables.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: str | None = None,
        words: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port, self._folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self._words = ["--backend-store-uri", store or f"sqlite:///{folder}/mlflow.db", *words]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words, *self._words],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "mlflow.log").open("ab"),
            start_new_session=True,
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:  # noqa: S310
                    assert answer.status == 200
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail("the MLflow server did not start within a minute")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
