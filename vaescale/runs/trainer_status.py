"""Progress reports to the status server of Kubeflow Trainer, which shows them in `kubectl describe trainjob`.

Trainer 2.2 and newer, with the feature gate TrainJobStatus, names in three variables a URL, a file with the server's CA and a
file with a token that changes within the hour. A thread posts the newest numbers; training never waits for it.
Source: github.com/kubeflow/trainer v2.3.0, pkg/statusserver/server.go and pkg/apis/trainer/v1alpha1/trainjob_types.go.
"""

import http.client
import json
import math
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vaescale.system.console import say
from vaescale.system.files import strict_json

URL, CA_FILE, TOKEN_FILE = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
EVERY_SECONDS = 10.0  # between two reports; the server shares one cluster's API with all jobs
FAILED_EVERY_SECONDS = 60.0  # after one that failed
TIMEOUT_SECONDS = 5.0  # of a connection, and of the last report
MOST_METRICS, MOST_CHARACTERS = 256, 64  # the server refuses more
MOST_SECONDS = 2**31 - 1
MOST_BYTES = 65536  # of a token or an answer


class Address(NamedTuple):
    """Where reports go: a host, its port and a path, the file of its CA and the file of the token."""

    host: str
    port: int
    path: str
    ca_file: str
    token_file: str


class ReportFault(Exception):
    """Why a report was not taken."""


class TrainerStatus:
    """A thread that reports progress: `with TrainerStatus(os.environ, steps, start=0, shown=True) as status: status.update(...)`.

    Without the three variables, or with shown false (on all processes but the first), it does nothing. start: the step that
    training continues from, for the estimate of the remaining time. It never raises; the first failure is printed.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        steps: int,
        *,
        start: int,
        shown: bool,
        every_seconds: float = EVERY_SECONDS,
        failed_every_seconds: float = FAILED_EVERY_SECONDS,
    ) -> None:
        self._steps, self._start, self._begun = steps, start, time.monotonic()
        self._every, self._failed_every = every_seconds, failed_every_seconds
        self._address = read_address(environment) if shown else None
        self._newest: tuple[int, dict[str, float]] | None = None
        self._is_new, self._stop = threading.Event(), threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="trainer-status")

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Replace what the next report says: `done` steps, and the newest value of each metric."""
        if self._address is None:
            return
        before = self._newest[1] if self._newest else {}
        self._newest = (done, {**before, **metrics})
        self._is_new.set()

    def __enter__(self) -> "TrainerStatus":
        if self._address is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._address is None:
            return
        self._stop.set()
        self._is_new.set()
        self._thread.join(TIMEOUT_SECONDS)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._is_new.wait()
            self._is_new.clear()
            wait = self._every if self._send() else self._failed_every
            self._stop.wait(wait)
        if self._is_new.is_set():
            self._send()

    def _send(self) -> bool:
        """Post the newest numbers. Returns whether the server took them."""
        newest = self._newest
        if newest is None or self._address is None:
            return True
        done, metrics = newest
        elapsed = time.monotonic() - self._begun
        report = status_report(
            done, self._steps, metrics, remaining_seconds=self._remaining(done, elapsed), now=time.time()
        )
        try:
            post(self._address, report)
        except ReportFault as fault:
            if not self._has_failed:
                self._has_failed = True
                say(
                    f"Kubeflow Trainer's status server ({self._address.host}:{self._address.port}) took no progress report: "
                    f"{fault}; training goes on, and the next reports follow"
                )
            return False
        return True

    def _remaining(self, done: int, elapsed: float) -> float | None:
        """Seconds to the last step at the pace of this process so far, with its evaluations and checkpoints."""
        if done >= self._steps:
            return 0.0
        return elapsed / (done - self._start) * (self._steps - done) if done > self._start else None


def read_address(environment: Mapping[str, str]) -> Address | None:
    """Where the environment says that reports go, or None. Prints why a URL cannot be used."""
    values = [environment.get(name) for name in (URL, CA_FILE, TOKEN_FILE)]
    if not all(values):
        return None
    url, ca_file, token_file = (str(value) for value in values)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError:
        host = None
    if not host or parts.scheme != "https":  # a token goes over nothing else
        say(f"{URL} (={url!r}) is not an https:// address; no progress is reported to Kubeflow Trainer")
        return None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(host, port, path, ca_file, token_file)


def status_report(
    done: int,
    steps: int,
    metrics: Mapping[str, float],
    *,
    remaining_seconds: float | None,
    now: float,
) -> dict[str, Any]:
    """The body of a report: whole percents and seconds, metrics as text, and a time in RFC 3339. `now`: seconds since 1970."""
    listed = [
        {"name": name, "value": f"{value:.6g}"}
        for name, value in sorted(metrics.items())
        if 0 < len(name) <= MOST_CHARACTERS and math.isfinite(value)
    ]
    status: dict[str, Any] = {
        "progressPercentage": max(0, min(100, 100 * done // steps)),
        "metrics": listed[:MOST_METRICS],
        "lastUpdatedTime": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if remaining_seconds is not None:
        status["estimatedRemainingSeconds"] = int(min(max(0.0, remaining_seconds), MOST_SECONDS))
    return {"trainerStatus": status}


def post(address: Address, report: Mapping[str, Any]) -> None:
    """Post a report. Raises ReportFault with the reason, which never contains the token.

    No proxy of the environment is asked and no redirect followed: either would hand the token to another host.
    """
    token = _read_token(address.token_file)
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise ReportFault(f"{address.ca_file} is not a CA file ({error.strerror or error})") from None
    connection = http.client.HTTPSConnection(
        address.host, address.port, timeout=TIMEOUT_SECONDS, context=context
    )
    try:
        connection.request(
            "POST",
            address.path,
            body=strict_json(report),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        if not 200 <= answer.status < 300:
            raise ReportFault(_short(f"{answer.status} {answer.reason}{_message(answer.read(MOST_BYTES))}"))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ReportFault(_short(reason)) from None
    finally:
        connection.close()


def _read_token(file: str) -> str:
    """The token, read for each report because the cluster replaces it."""
    try:
        with Path(file).open("rb") as opened:
            token = opened.read(MOST_BYTES).strip().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportFault(f"{file} has no token ({getattr(error, 'strerror', None) or 'not text'})") from None
    if (
        not token or not token.isprintable() or " " in token
    ):  # http.client would quote a wrong one in its error
        raise ReportFault(f"{file} has no token")
    return token


def _message(body: bytes) -> str:
    """The reason in a Kubernetes status, if the answer is one."""
    try:
        message = json.loads(body)["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f", {message}" if isinstance(message, str) else ""


def _short(text: str) -> str:
    """What a server said, as a part of one line."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:200])
