"""Access to MLflow stores: reading runs, and writing parent runs and models. `tracking.py` sends a run."""

import tempfile
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.runs.store_faults import explained, explained_files
from vaescale.runs.stores import (
    absolute_uri,
    be_patient,
    client_of,
    experiment_id,
    quiet,
    refuse_deleted,
    refuse_malformed,
    sqlite_path,
)
from vaescale.system.console import say
from vaescale.system.secrets import redact

PROGRESS = "figures/progress"  # pictures that were drawn during training


class Stored(NamedTuple):
    """A run as a store has it, flat.

    place: its id. curves: (step, value) of the requested metrics; pictures: by file name; evaluations: the JSON files of verbs'
    results; experiment_id: of its experiment.
    """

    name: str
    place: str
    recipe: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[float, float]]]
    pictures: dict[str, bytes]
    data_hash: str
    evaluations: list[bytes]
    experiment_id: str = ""


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
    try:
        refuse_malformed(uri)
    except ValueError as error:
        raise UserError(f"--store is {redact(uri)!r}; {error}") from None
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UserError(f"{uri} does not exist; give --store, the tracking.mlflow of the recipes")
    be_patient()
    try:
        with quiet():
            client = client_of(absolute_uri(uri))
            stored = client.get_experiment_by_name(experiment)
            if stored is None:
                names = ", ".join(sorted(other.name for other in client.search_experiments()))
                raise UserError(f"{uri} has no experiment {experiment!r}; there are {names}")
            refuse_deleted(stored, absolute_uri(uri))
            runs = client.search_runs([stored.experiment_id], filter_string=where or "", max_results=most)
            files = _Files(client, pictures, results)
            return [_stored(client, run, curves, files) for run in runs]
    except UserError:
        raise
    except Exception as error:  # whatever a server, a database or a network may raise
        fault, shown = explained(error, uri), redact(uri)
        if where and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
            raise UserError(
                f"MLflow at {shown} says: {fault.reason}; a metric is called metrics.`val/mse`, a recipe's key "
                "params.`likelihood.sigma`"
            ) from error
        raise UserError(fault.sentence(shown)) from error


def _stored(client: Any, run: Any, curves: Sequence[str], files: "_Files") -> Stored:
    run_id, metrics = run.info.run_id, dict(run.data.metrics)
    points = {
        name: [(float(point.step), float(point.value)) for point in client.get_metric_history(run_id, name)]
        for name in curves
        if name in metrics
    }
    images, evaluations, recipe = files.of(run)
    return Stored(
        run.info.run_name,
        run_id,
        recipe or dict(run.data.params),
        metrics,
        points,
        images,
        run.data.tags.get("val_data_hash", ""),
        evaluations,
        str(run.info.experiment_id),
    )


class _Files:
    """The files of runs. When the artifact store fails once, it is not asked again: each request may take minutes.

    pictures: paths of PNG files; results: patterns of JSON files.
    """

    def __init__(self, client: Any, pictures: Sequence[str], results: Sequence[str]) -> None:
        self._client, self._pictures, self._results = client, pictures, results
        self._is_readable = True

    def of(self, run: Any) -> tuple[dict[str, bytes], list[bytes], dict[str, str]]:
        """A run's pictures, results, and the recipe if it was changed. All are empty when they cannot be read."""
        if self._is_readable:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    return self._read(run, folder)
            except Exception as error:  # whatever an artifact store may raise
                self._is_readable = False
                fault = explained_files(error, run.info.artifact_uri)
                say(
                    f"pictures, results and changed recipes are left out, from the run {run.info.run_name} on: {fault}"
                )
        return {}, [], {}

    def _read(self, run: Any, folder: str) -> tuple[dict[str, bytes], list[bytes], dict[str, str]]:
        run_id, recipe = run.info.run_id, dict[str, str]()

        def content(path: str) -> bytes:
            return Path(self._client.download_artifacts(run_id, path, folder)).read_bytes()

        names = [
            file.path
            for name in ("figures", "evaluation", "gmm")
            for file in self._client.list_artifacts(run_id, name)
        ]
        images = {Path(path).name: content(path) for path in self._pictures if path in names}
        if PROGRESS in names and len(images) < len(
            self._pictures
        ):  # of a run that was not evaluated or sampled from
            steps = sorted(file.path for file in self._client.list_artifacts(run_id, PROGRESS))
            images |= {Path(path).name: content(path) for path in steps[-1:]}
        results = [content(path) for path in names if any(fnmatch(path, name) for name in self._results)]
        if "changes" in run.data.tags:  # params cannot change; recipe.yaml has the accepted changes
            read: Any = OmegaConf.to_container(OmegaConf.create(content("recipe.yaml").decode()))
            recipe = {name: str(value) for name, value in flat(read).items()}
        return (
            {name: png for name, png in images.items() if png.startswith(b"\x89PNG")},
            results,
            recipe,
        )


def parent_run(uri: str | None, experiment: str, name: str) -> str | None:
    """Create an MLflow run as the parent of others. Returns its id; None without a store, or when it does not answer."""
    if uri is None:
        return None
    be_patient()
    try:
        with quiet():
            absolute = absolute_uri(uri)
            client = client_of(absolute)
            run = client.create_run(
                experiment_id(client, absolute, experiment), run_name=name, tags={"sweep": name}
            )
            client.set_terminated(run.info.run_id)
            return str(run.info.run_id)
    except Exception as error:  # whatever a server or a network may raise; the runs then have no parent
        say(f"{explained(error, uri).sentence(uri)}; the runs will have no parent run")
        return None


class Model(NamedTuple):
    """A model for MLflow: a folder that is copied into it, and the module whose `_load_pyfunc` loads that copy.

    params: names and defaults of predict's parameters. details: metadata that MLflow's pages show. code: files and folders of source
    that are copied with it. packages: the installed packages that the code needs, which are pinned.
    """

    data: Path
    loader: str
    params: dict[str, Any]
    details: dict[str, Any]
    code: list[Path]
    packages: Sequence[str]


def save_model(model: Model, folder: Path) -> None:
    """Write an MLflow model to a folder that does not exist."""
    be_patient()
    with (
        quiet(),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # MLflow warns of a missing example
        from mlflow import pyfunc

        pyfunc.save_model(path=str(folder), **_pyfunc_arguments(model))


def log_model(model: Model, run_id: str, uri: str) -> str:
    """Add a model to a run of the MLflow store at an absolute URI. Returns the model's URI. Raises UserError when the store fails."""
    be_patient()
    try:
        with quiet(), warnings.catch_warnings(action="ignore", category=UserWarning):
            return _log_model(model, run_id, uri)
    except UserError:
        raise
    except Exception as error:  # whatever a server or a network may raise
        raise UserError(explained(error, uri).sentence(redact(uri))) from error


def _log_model(model: Model, run_id: str, uri: str) -> str:
    import mlflow

    client_of(uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    before = client.get_run(run_id).info
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(name="model", **_pyfunc_arguments(model))
    if before.status == "RUNNING":  # start_run has ended the run
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, before.status, before.end_time)
    return str(logged.model_uri)


def _pyfunc_arguments(model: Model) -> dict[str, Any]:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    kinds = {str: "string", float: "double", int: "long"}
    params = [ParamSpec(name, kinds[type(default)], default) for name, default in model.params.items()]
    # No schema of the images: MLflow would cast real numbers to its one type, 0.9 to the level 0 of uint8, before the model sees them.
    signature = ModelSignature(params=ParamSchema(params))
    return {
        "loader_module": model.loader,
        "data_path": str(model.data),
        "signature": signature,
        "code_paths": [str(path) for path in model.code],
        "pip_requirements": [pinned(name) for name in model.packages],
        "metadata": model.details,
    }


def pinned(package: str) -> str:
    """NAME==VERSION as installed, without the label of a local build: 2.13.0+cpu is on no index, 2.13.0 is."""
    return f"{package}=={version(package).partition('+')[0]}"
