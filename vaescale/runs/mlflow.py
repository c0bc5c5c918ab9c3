"""Access to MLflow stores: reading runs, and writing parent runs and models. `tracking.py` sends a run."""

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vaescale.config import flat
from vaescale.errors import MissingPackage, UserError
from vaescale.system import collector
from vaescale.system.console import say
from vaescale.system.secrets import redact

SQLITE = "sqlite:///"
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # otherwise MLflow's pages treat it as an experiment of language models


class Stored(NamedTuple):
    """A run as a store has it, flat.

    place: its id. curves: (step, value) of the requested metrics; pictures: by file name; evaluations: the JSON files of verbs'
    results.
    """

    name: str
    place: str
    recipe: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[float, float]]]
    pictures: dict[str, bytes]
    data_hash: str
    evaluations: list[bytes]


def stored_runs(
    uri: str,
    experiment: str,
    where: str | None,
    *,
    most: int,
    curves: Sequence[str] = (),
    pictures: Sequence[str] = (),
    results: Sequence[str] = (),
) -> list[Stored]:
    """The runs of an experiment, the latest first, at most `most` of them.

    where: MLflow's filter; results: patterns of JSON artifacts. Raises UserError when the store or the experiment does not
    exist, or the filter is not valid.
    """
    be_patient()
    with quiet():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise UserError(f"{uri} does not exist; give --store, the tracking.mlflow of the recipes")
        client = MlflowClient(absolute_uri(uri))
        try:
            stored = client.get_experiment_by_name(experiment)
            if stored is None:
                names = ", ".join(sorted(other.name for other in client.search_experiments()))
                raise UserError(f"{uri} has no experiment {experiment!r}; there are {names}")
            runs = client.search_runs([stored.experiment_id], filter_string=where or "", max_results=most)
            return [_stored(client, run, curves, pictures, results) for run in runs]
        except MlflowException as error:
            message = str(error).partition("\n")[0]
            remedy = (
                "; a metric is called metrics.`val/mse`, a recipe's key params.`likelihood.sigma`"
                if where
                else ""
            )
            raise UserError(f"MLflow at {redact(uri)} says: {message}{remedy}") from error


def _stored(
    client: Any, run: Any, curves: Sequence[str], pictures: Sequence[str], results: Sequence[str]
) -> Stored:
    run_id, metrics = run.info.run_id, dict(run.data.metrics)
    points = {
        name: [(float(point.step), float(point.value)) for point in client.get_metric_history(run_id, name)]
        for name in curves
        if name in metrics
    }
    folders = ("figures", "evaluation", "gmm")
    artifacts = [file.path for name in folders for file in client.list_artifacts(run_id, name)]
    recipe = dict(run.data.params)
    with tempfile.TemporaryDirectory() as folder:

        def content(path: str) -> bytes:
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()

        images = {Path(path).name: content(path) for path in pictures if path in artifacts}
        evaluations = [content(path) for path in artifacts if any(fnmatch(path, name) for name in results)]
        if "changes" in run.data.tags:  # params cannot change; recipe.yaml has the accepted changes
            read: Any = OmegaConf.to_container(OmegaConf.create(content("recipe.yaml").decode()))
            recipe = {name: str(value) for name, value in flat(read).items()}
    return Stored(
        run.info.run_name,
        run_id,
        recipe,
        metrics,
        points,
        {name: png for name, png in images.items() if png.startswith(b"\x89PNG")},
        run.data.tags.get("val_data_hash", ""),
        evaluations,
    )


def parent_run(uri: str | None, experiment: str, name: str) -> str | None:
    """Create an MLflow run as the parent of others. Returns its id; None without a store, or when it does not answer."""
    if uri is None:
        return None
    be_patient()
    try:
        with quiet():
            from mlflow import MlflowClient

            client = MlflowClient(absolute_uri(uri))
            run = client.create_run(
                experiment_id(client, uri, experiment), run_name=name, tags={"sweep": name}
            )
            client.set_terminated(run.info.run_id)
            return str(run.info.run_id)
    except Exception as error:  # whatever a server or a network may raise; the runs then have no parent
        say(f"MLflow at {uri} does not answer ({error}); the runs will have no parent run")
        return None


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, created if it does not exist. A local store keeps its artifacts beside itself."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    absolute = absolute_uri(uri)
    local = absolute.startswith(SQLITE)
    artifacts = (Path(absolute.removeprefix(SQLITE)).parent / "mlartifacts").as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=artifacts, tags=KIND))


def absolute_uri(uri: str) -> str:
    """Make a relative SQLite path absolute, and create its folder."""
    if not uri.startswith(SQLITE):
        return uri
    path = Path(uri.removeprefix(SQLITE)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return SQLITE + str(path)


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


class Model(NamedTuple):
    """A model for MLflow: a folder that is copied into it, and the module whose `_load_pyfunc` loads that copy.

    image_shape: C, H, W of the uint8 images that it takes. params: names and defaults of predict's parameters. details:
    metadata that MLflow's pages show.
    """

    data: Path
    loader: str
    image_shape: tuple[int, int, int]
    params: dict[str, Any]
    details: dict[str, Any]


def save_model(model: Model, folder: Path) -> None:
    """Write an MLflow model to a folder that does not exist."""
    be_patient()
    with (
        quiet(),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # MLflow warns of a missing example
        from mlflow import pyfunc

        pyfunc.save_model(path=str(folder), **_pyfunc_arguments(model))


def log_model(model: Model, known: dict[str, Any], uri: str) -> str:
    """Add a model to an MLflow run. known: the content of RUN/mlflow.json. Returns the model's URI."""
    be_patient()
    with quiet(), warnings.catch_warnings(action="ignore", category=UserWarning):
        import mlflow

        # Only the recipe has a URI with credentials.
        mlflow.set_tracking_uri(uri if redact(uri) != uri else known["tracking_uri"])
        client = mlflow.MlflowClient()
        before = client.get_run(known["run_id"]).info
        with mlflow.start_run(run_id=known["run_id"]):
            logged = mlflow.pyfunc.log_model(name="model", **_pyfunc_arguments(model))
        if before.status == "RUNNING":  # start_run has ended the run
            client.update_run(known["run_id"], status="RUNNING")
        else:
            client.set_terminated(known["run_id"], before.status, before.end_time)
        return str(logged.model_uri)


def _pyfunc_arguments(model: Model) -> dict[str, Any]:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    from vaescale import __version__

    kinds = {str: "string", float: "double", int: "long"}
    params = [ParamSpec(name, kinds[type(default)], default) for name, default in model.params.items()]
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *model.image_shape))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, *model.image_shape))]),
        ParamSchema(params),
    )
    return {
        "loader_module": model.loader,
        "data_path": str(model.data),
        "signature": signature,
        "pip_requirements": [f"vaescale=={__version__}"],
        "metadata": model.details,
    }
