"""MLflow's stores: how they are reached, and what is read from them. What a run sends is in `tracking.py`."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.system.console import say
from vaescale.system.secrets import redact

SQLITE = "sqlite:///"
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # or MLflow's pages take it for one of language models


class Stored(NamedTuple):
    """A run as a store has it, flat. curves: (step, value) of the metrics that were asked for; pictures: by file name;
    evaluations: the JSON files of what verbs measured.
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
    """The runs of an experiment, the latest first, at most so many. where: MLflow's filter; results: patterns of JSON artifacts. Raises UserError where the store, the
    experiment or the filter is none.
    """
    be_patient()
    with quiet():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise UserError(f"{uri} is not there; give --store, the tracking.mlflow of the recipes")
        client = MlflowClient(absolute_uri(uri))
        try:
            found = client.get_experiment_by_name(experiment)
            if found is None:
                names = ", ".join(sorted(one.name for one in client.search_experiments()))
                raise UserError(f"{uri} has no experiment {experiment!r}; there are {names}")
            runs = client.search_runs([found.experiment_id], filter_string=where or "", max_results=most)
            return [_stored(client, run, curves, pictures, results) for run in runs]
        except MlflowException as error:
            words = str(error).partition("\n")[0]
            remedy = (
                "; a metric is called metrics.`val/mse`, a recipe's key params.`likelihood.sigma`"
                if where
                else ""
            )
            raise UserError(f"MLflow at {redact(uri)} says: {words}{remedy}") from error


def _stored(
    client: Any, run: Any, curves: Sequence[str], pictures: Sequence[str], results: Sequence[str]
) -> Stored:
    run_id, metrics = run.info.run_id, dict(run.data.metrics)
    points = {
        name: [(float(one.step), float(one.value)) for one in client.get_metric_history(run_id, name)]
        for name in curves
        if name in metrics
    }
    folders = ("figures", "evaluation", "gmm")
    there = [one.path for place in folders for one in client.list_artifacts(run_id, place)]
    recipe = dict(run.data.params)
    with tempfile.TemporaryDirectory() as folder:

        def content(place: str) -> bytes:
            return Path(client.download_artifacts(run_id, place, folder)).read_bytes()

        images = {Path(place).name: content(place) for place in pictures if place in there}
        evaluations = [content(place) for place in there if any(fnmatch(place, own) for own in results)]
        if "changes" in run.data.tags:  # params stay what they were; the file is what the run went on with
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
    """A new MLflow run for others to stand below, by its id. Without a store, or when it does not answer, None."""
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
    except Exception as error:  # whatever a server or a network may raise; the runs stand by themselves then
        say(f"MLflow at {uri} does not answer ({error}); the runs will stand by themselves")
        return None


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Of an experiment, made if it is not there; a local store keeps artifacts beside itself."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    absolute = absolute_uri(uri)
    local = absolute.startswith(SQLITE)
    place = (Path(absolute.removeprefix(SQLITE)).parent / "mlartifacts").as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=place, tags=KIND))


def absolute_uri(uri: str) -> str:
    """A relative SQLite path made absolute, and its folder made."""
    if not uri.startswith(SQLITE):
        return uri
    path = Path(uri.removeprefix(SQLITE)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return SQLITE + str(path)


def be_patient() -> None:
    """For seconds rather than for the minutes that MLflow would block by default, and without a word to its makers."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is a verb's result
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MLflow narrates its migrations, on loggers that importing it sets up."""
    import logging

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

    image_shape: C, H, W of the uint8 images that it takes. params: names and defaults of predict's parameters. details: what
    MLflow's pages say of it.
    """

    data: Path
    loader: str
    image_shape: tuple[int, int, int]
    params: dict[str, Any]
    details: dict[str, Any]


def save_model(model: Model, folder: Path) -> None:
    """Write an MLflow model to a folder that does not exist."""
    be_patient()
    with quiet(), warnings.catch_warnings(action="ignore", category=UserWarning):  # it would like an example
        from mlflow import pyfunc

        pyfunc.save_model(path=str(folder), **_pyfunc_arguments(model))


def log_model(model: Model, known: dict[str, Any], uri: str) -> str:
    """Add a model to an MLflow run. known: what RUN/mlflow.json says of the run. Returns the model's URI."""
    be_patient()
    with quiet(), warnings.catch_warnings(action="ignore", category=UserWarning):
        import mlflow

        # A URI with credentials is in the recipe alone.
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
