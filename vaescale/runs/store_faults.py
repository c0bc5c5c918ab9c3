"""Faults of MLflow stores, each as a reason and a remedy, and whether waiting can help.

MLflow raises its own exceptions, those of requests, of SQLAlchemy and of a store's client, mostly as `MlflowException` with the
cause in the text. The texts matched here are those of MLflow 3.17; what matches none is shown as it is, cut to one line.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vaescale.errors import UserError
from vaescale.system.secrets import redact

MOST_CHARACTERS = 300  # of a reason
LOGIN = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
)
OTHER_PLACE = (
    "make it writable, or choose another tracking.experiment: MLflow keeps an experiment's place for good"
)
INACTIVE = "must be in the 'active' state"
PASSING = re.compile(
    r"(?i)timed? ?out|refused|no answer|unreachable|aborted|reset by peer|failed with exception|database is locked"
    rf"|too many|lock timeout|could not connect|connection to server|{INACTIVE}"
)
PASSING_CODES = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")


class StoreFault(Exception):
    """A store that does not take a run, or does not show its runs.

    reason: what is wrong; remedy: what to do about it, or empty. passes: whether the same request may succeed later. files:
    whether only artifacts are concerned.
    """

    def __init__(self, reason: str, remedy: str = "", *, passes: bool = False, files: bool = False) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy, self.passes, self.files = reason, remedy, passes, files

    def sentence(self, uri: str) -> str:
        """The fault of the store at `uri` as a sentence without a full stop."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        if self.files:
            return f"MLflow at {uri} does not get the run's files ({self.reason}){remedy}"
        if self.passes:
            return f"MLflow at {uri} does not answer ({self.reason}){remedy}"
        return f"MLflow at {uri} cannot be used: {self.reason}{remedy}"


def explained(error: Exception, uri: str) -> StoreFault:
    """The fault behind an exception that MLflow raised. uri: of the store."""
    if isinstance(error, StoreFault):
        return error
    if isinstance(error, UserError):
        return StoreFault(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = _package(error.name)
        return StoreFault(f"{package} is not installed", f"pip install {package}")
    text = str(error) or type(error).__name__
    return (
        _schema_fault(text, uri)
        or _database_fault(text)
        or _certificate_fault(text)
        or _http_fault(text, error, uri)
        or StoreFault(_short(text), passes=_may_pass(error, text))
    )


def was_deleted(fault: StoreFault) -> bool:
    """Whether a fault is that of a run which somebody deleted while it was being sent."""
    return INACTIVE in fault.reason


def explained_files(error: Exception, place: str) -> StoreFault:
    """The fault behind an exception of the artifact store at `place`."""
    if isinstance(error, StoreFault):
        return error
    where, text = redact(place), str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = _package(error.name)
        return StoreFault(f"{where} needs {package}", f"pip install {package}", files=True)
    if "credentials" in text.lower():
        remedy = "set the credentials of the artifact store in the environment"
        return StoreFault(f"{where}: {_short(text)}", remedy, files=True)
    if (
        isinstance(error, OSError)
        and not isinstance(error, ConnectionError | TimeoutError)
        and error.strerror
    ):
        return StoreFault(f"{where}: {error.strerror}", OTHER_PLACE, files=True)
    return StoreFault(f"{where}: {_short(text)}", passes=_may_pass(error, text), files=True)


def _schema_fault(text: str, uri: str) -> StoreFault | None:
    """The fault of a database whose schema is of another version of MLflow."""
    versions = re.search(r"found version (\w+), but expected (\w+)", text)
    if versions is None:
        return None
    from mlflow import __version__ as installed

    shown = redact(uri)
    if _is_earlier_schema(versions[1]):
        return StoreFault(
            f"its database was made by an earlier MLflow than {installed}",
            f"copy the database, then: mlflow db upgrade {shown}",
        )
    return StoreFault(
        f"its database was made by a later MLflow than {installed}", "pip install --upgrade mlflow"
    )


def _is_earlier_schema(version: str) -> bool:
    """Whether the installed MLflow knows how to go on from a schema's version."""
    import mlflow.store

    scripts = Path(mlflow.store.__path__[0]) / "db_migrations" / "versions"
    return version == "None" or any(scripts.glob(f"{version}_*.py"))


def _database_fault(text: str) -> StoreFault | None:
    """The fault of a database that cannot be opened or written."""
    for sign, remedy in (
        ("unable to open database file", "check that its folder exists and can be written"),
        ("file is not a database", "name another file"),
        ("file is encrypted", "name another file"),
        ("disk image is malformed", "restore it from a copy, or name another file"),
        ("readonly database", "make the file and its folder writable"),
    ):
        if sign in text:
            return StoreFault(sign, remedy)
    return None


def _certificate_fault(text: str) -> StoreFault | None:
    """The fault of TLS between this machine and a server."""
    if "CERTIFICATE_VERIFY_FAILED" in text:
        detail = re.search(r"certificate verify failed: ([^(\\'\"]+)", text)
        return StoreFault(
            f"its TLS certificate is not trusted ({detail[1].strip() if detail else 'not verified'})",
            "name your authority's file in MLFLOW_TRACKING_SERVER_CERT_PATH",
        )
    if "SSLError" in text or "[SSL" in text:
        detail = re.search(r"\[SSL: (\w+)\]", text)
        return StoreFault(
            f"it does not speak TLS ({detail[1] if detail else 'SSLError'})",
            "check https:// in tracking.mlflow",
        )
    return None


def _http_fault(text: str, error: Exception, uri: str) -> StoreFault | None:
    """The fault of a server that answers with an HTTP error, or with something else than MLflow's JSON."""
    host = urlsplit(redact(uri)).netloc.rpartition("@")[2]
    status = re.search(r"failed with error code (\d+)", text)
    number, code = int(status[1]) if status else 0, str(getattr(error, "error_code", ""))
    body = _short(text.partition("Response body:")[2].strip().strip("'") or text)
    if "Invalid Host header" in text:
        remedy = f"start it by `mlflow server --allowed-hosts {host}`, or use a host name that it allows"
        return StoreFault(f"the server refuses the host name {host} (403)", remedy)
    if number == 401 or code == "UNAUTHENTICATED":
        return StoreFault("the server wants a login (401)", LOGIN)
    if number == 403 or code == "PERMISSION_DENIED":
        remedy = f"ask for the permission, or {LOGIN}"
        return StoreFault(f"the server refuses this user (403: {body})", remedy)
    if "not in a valid JSON format" in text:
        title = re.search(r"(?is)<title[^>]*>(.*?)</title>", text)
        page = f", {_short(title[1])!r}" if title else ""
        remedy = f"check the address and, if that is a login page, {LOGIN}"
        return StoreFault(f"a web page answers{page}, not MLflow", remedy)
    if number == 404 and code != "RESOURCE_DOES_NOT_EXIST":
        return StoreFault("nothing of MLflow is at this address (404)", "check tracking.mlflow")
    if number:
        return StoreFault(f"{number}: {body}", passes=number >= 500 or number in (408, 429))
    if "Failed to resolve" in text or "Name or service not known" in text:
        return StoreFault(f"the host name {host} is not known", "check tracking.mlflow and the network")
    cause = (
        re.search(r"\[Errno \d+\] ([\w ]+)|(timed out)", text) if "failed with exception" in text else None
    )
    return StoreFault(cause[1] or cause[2], passes=True) if cause else None


def _may_pass(error: Exception, text: str) -> bool:
    code = getattr(error, "error_code", "")
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or code in PASSING_CODES
        or bool(PASSING.search(text))
    )


def _package(module: str) -> str:
    """The package that holds a module which a store's client lacks."""
    root = module.partition(".")[0]
    return {
        "botocore": "boto3",
        "psycopg2": "psycopg2-binary",
        "MySQLdb": "mysqlclient",
        "google": "google-cloud-storage",
    }.get(root, root)


def _short(text: Any) -> str:
    """A text as one line, cut to MOST_CHARACTERS."""
    line = " ".join(str(text).split())
    return line if len(line) <= MOST_CHARACTERS else line[:MOST_CHARACTERS] + "..."
