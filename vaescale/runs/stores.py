"""MLflow stores: the URIs that name them, their first contact, and their experiments."""

import contextlib
import importlib.util
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vaescale.errors import MissingPackage
from vaescale.runs.first_contact import alone_with_database, alone_with_file
from vaescale.runs.store_faults import StoreFault
from vaescale.system import collector
from vaescale.system.secrets import redact

SQLITE = "sqlite:///"
STORES = (SQLITE, "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # otherwise MLflow's pages treat it as an experiment of language models
ARTIFACTS = "mlartifacts"  # the folder beside a local store
_contacted: set[str] = set()


def refuse_malformed(uri: str) -> None:
    """Raise ValueError, with the right form spelled, when a text is no URI of an MLflow store."""
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:").lstrip("/").partition("?")[0]
        is_file = bool(path) and not path.endswith("/") and ":memory:" not in path
        if not uri.startswith(SQLITE) or not is_file:
            raise ValueError(
                _forms(path.rstrip("/") if is_file else f"{path}mlflow.db".replace(":memory:", ""))
            )
    elif not uri.startswith(STORES):
        raise ValueError(_nearest_form(uri))


def _nearest_form(uri: str) -> str:
    """What to write in place of a text that begins like no store."""
    scheme, separator, rest = uri.partition("://")
    host, _, port = uri.partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        return f"write http://{uri}; null means none"
    if separator and scheme != "file":
        return f"an MLflow store begins with one of {', '.join(STORES)}; null means none"
    folder = (rest if separator else uri.removeprefix("file:")).rstrip("/")
    return f"a store is a database, not a folder of files; {_forms(os.path.normpath(f'{folder}/mlflow.db'))}"


def _forms(path: str) -> str:
    """The two forms of a SQLite store's URI, as a remedy."""
    relative = path.lstrip("/") or "mlflow.db"
    absolute = path if path.startswith("/") else Path(relative).absolute()
    return f"write {SQLITE}{relative} for a file below the working folder, or {SQLITE}{absolute} for an absolute path"


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for another store."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def absolute_uri(uri: str, project: Path | None = None) -> str:
    """Make a relative SQLite path absolute. project: the folder that it is relative to, by default the working folder."""
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    return uri.replace(str(path), os.path.normpath((project or Path.cwd()) / path), 1)


def client_of(uri: str) -> Any:
    """MLflow's client of a store, by its absolute URI. Makes the tables of a database that has none.

    One process at a time meets a database for the first time (`first_contact`). Raises StoreFault, and what MLflow raises.
    """
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if uri in _contacted and (path is None or path.is_file()):
        return MlflowClient(uri)
    with alone_with_database(uri) if path is None else alone_with_file(path):
        if path is not None:
            _refuse_unreadable(path)
        client = MlflowClient(uri)
    _contacted.add(uri)
    return client


def _refuse_unreadable(path: Path) -> None:
    """Raise an error for a file that is no SQLite database: MLflow would try again for a minute."""
    if path.is_dir():
        raise StoreFault(f"{path} is a folder", f"name a file, such as {SQLITE}{path}/mlflow.db")
    if path.is_file():
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA schema_version")


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, created if it does not exist. A local store keeps its artifacts beside itself.

    uri: the store's, absolute. Raises StoreFault for a deleted experiment.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_path(uri)
        artifacts = (path.parent / ARTIFACTS).as_uri() if path else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=KIND))
        except MlflowException:  # another process may have created it since
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    refuse_deleted(experiment, uri)
    return str(experiment.experiment_id)


def refuse_deleted(experiment: Any, uri: str) -> None:
    """Raise StoreFault for an experiment of MLflow's that was deleted; MLflow keeps its name. uri: the store's, absolute."""
    if experiment.lifecycle_stage == "deleted":
        raise StoreFault(
            f"its experiment {experiment.name!r} was deleted",
            f"choose another tracking.experiment, or restore it: MLFLOW_TRACKING_URI={redact(uri)} mlflow experiments "
            f"restore --experiment-id {experiment.experiment_id}",
        )


def refuse_moved_artifacts(client: Any, uri: str, run: Any) -> None:
    """Raise StoreFault when a local store was moved or copied: MLflow would write the artifacts to the place that it came from.

    run: MLflow's. Only the place that `experiment_id` chooses is checked.
    """
    path, place = sqlite_path(uri), str(run.info.artifact_uri)
    if path is None or f"/{ARTIFACTS}/" not in place or not place.startswith("file://"):
        return
    before = place.partition(f"/{ARTIFACTS}/")[0]
    is_ours = client.get_experiment(run.info.experiment_id).tags.items() >= KIND.items()
    if not is_ours or _is_same_folder(Path(before.removeprefix("file://")), path.parent):
        return
    after = path.parent.as_uri()
    changed = "; ".join(
        f"UPDATE {table} SET {column} = replace({column}, '{before}/', '{after}/')"  # noqa: S608
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri"))
    )
    raise StoreFault(
        f"the store came from {before}, where MLflow would still put them",
        f'sqlite3 {path} "{changed}"',
        files=True,
    )


def _is_same_folder(first: Path, second: Path) -> bool:
    return first == second or (first.is_dir() and second.is_dir() and first.samefile(second))


def be_patient() -> None:
    """Let MLflow block for seconds, not for minutes as by default, and turn its telemetry off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for a verb's result
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def is_installed() -> bool:
    """Whether MLflow can be imported. Does not import it, which takes seconds."""
    return importlib.util.find_spec("mlflow") is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence within the block what MLflow logs of its migrations, on loggers that its import sets up.

    Raises MissingPackage where MLflow is not installed.
    """
    import logging

    if not is_installed():
        raise MissingPackage("MLflow is not installed; pip install mlflow")
    with collector.paused():
        import mlflow  # noqa: F401

    names = ("alembic", "alembic.runtime.migration", "mlflow", "mlflow.store.db.utils")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
