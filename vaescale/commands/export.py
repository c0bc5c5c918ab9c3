"""Export a trained run: as MLflow's python_function (`served.py`), for diffusers, or as graphs. Without pickle.

OUT/data/run of an MLflow model is a run folder with the recipe, one kind of weights without an optimizer state, and the mixture or the
prior over codes if the run has one. OUT/code holds the source of vaescale and of modules with kinds of the user's own, so that the model loads where neither is installed.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from vaescale.aggregate import code_prior
from vaescale.commands import served
from vaescale.commands.export_diffusers import Scaling, export_diffusers
from vaescale.commands.export_onnx import export_onnx
from vaescale.commands.export_torch import export_torch
from vaescale.commands.hub import check_hub, push_folder
from vaescale.commands.model_card import write_card
from vaescale.commands.served import DEFAULTS, PACKAGES, _load_pyfunc
from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.by_class import FOLDER, load_by_class
from vaescale.runs import checkpoint, class_table, mlflow_state, origins
from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow import Model, log_model, save_model
from vaescale.runs.mlflow_state import store_uri
from vaescale.runs.tracking import TrackingConfig
from vaescale.system.console import say
from vaescale.system.files import make_readable, write_whole
from vaescale.trained import Trained, Weights, Which, number_of_classes, open_trained

__all__ = ["_load_pyfunc", "export", "write_run"]  # the first is what models of earlier versions name
Format = Literal["mlflow", "diffusers", "torch_export", "onnx"]


@checked
def export(
    run: Path,
    out: Path,
    *,
    format: Format = "mlflow",  # noqa: A002
    weights: Weights = "ema",
    log: bool = False,
    scaling: Scaling = "all",
    latent_images: Annotated[int, Field(ge=0)] = 10_000,
    push_to_hub: str | None = None,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Write a run to OUT, which must not exist, in one of FORMATS. Returns the path, the size and what was exported.

    format: `diffusers` writes an AutoencoderKL, whose factors are those of the latents of the first `latent_images` training
    images; 0: a factor of 1. scaling: one factor and shift for `all` channels, or the moments of each `channel`. `torch_export` and
    `onnx` write encoder and decoder as graphs (see `graphs.py`). weights: `ema` takes the averaged weights when the run has them. log:
    also add the model to the run in MLflow, and return its URI. push_to_hub: the name of a model repository, OWNER/NAME, to which
    OUT is sent with a model card. Raises UserError when the run cannot be opened, or when MLflow does not have the run and `log` is set. checkpoint: see `Which`.
    """
    if out.exists():
        raise UserError(f"{out} already exists; delete it or choose another OUT")
    if format != "mlflow" and log:
        raise UserError(f"--log adds MLflow models, and {format} is none; leave one of the two out")
    if push_to_hub:
        check_hub(push_to_hub)
    trained = open_trained(run, weights=weights, which=checkpoint)
    trained.announce("export")
    result = {"out": str(out), **FORMATS[format](trained, out, Options(log, scaling, latent_images))}
    write_card(trained, out, format=format)
    make_readable(out)
    result["bytes"] = _num_bytes(out)
    return result | (push_folder(trained, out, push_to_hub, format=format) if push_to_hub else {})


class Options(NamedTuple):
    """What single formats take: whether MLflow logs the model; for diffusers, which factors, from how many images."""

    log: bool
    scaling: Scaling
    latent_images: int


def _for_mlflow(trained: Trained, out: Path, options: Options) -> dict[str, Any]:
    log = options.log
    uri, known = trained.recipe.tracking.mlflow, mlflow_state.read(trained.folder)
    known = mlflow_state.located(trained.folder, known) if log else known
    if log and not (uri and known.get("run_id")):
        raise UserError(
            f"{trained.folder} is in no MLflow store; run `vaescale sync {trained.folder}` first, or leave --log out"
        )
    details = {"run": trained.recipe.name, "step": trained.step, "weights": trained.weights}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "run"
        write_run(trained, data)
        model = Model(data, served.__name__, DEFAULTS, details, _code(trained), PACKAGES)
        save_model(model, out)
        logged = (
            log_model(model, known["run_id"], store_uri(trained.folder, uri, known)) if log and uri else None
        )
    return {**details, **({"model_uri": logged} if logged else {})}


FORMATS: dict[Format, Callable[[Trained, Path, Options], dict[str, Any]]] = {
    "mlflow": _for_mlflow,
    "diffusers": lambda trained, out, options: export_diffusers(
        trained, out, latent_images=options.latent_images, scaling=options.scaling
    ),
    "torch_export": lambda trained, out, _: export_torch(trained, out),
    "onnx": lambda trained, out, _: export_onnx(trained, out),
}


def _code(trained: Trained) -> list[Path]:
    """The source of vaescale, and of the modules that the recipe's kinds come from: files, or folders of packages."""
    modules = {
        origin["module"].partition(".")[0]
        for origin in origins.origins_of(trained.recipe.sections()).values()
    }
    files = [Path(str(sys.modules[name].__file__)) for name in ("vaescale", *sorted(modules))]
    return [file.parent if file.name == "__init__.py" else file for file in files]


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_run(trained: Trained, folder: Path) -> None:
    """Write a run folder that `open_trained` opens and that cannot be trained: recipe, weights, and mixture or prior over codes."""
    folder.mkdir()
    # An exported run has no tracking: its later use is not part of the experiment.
    recipe = trained.recipe.model_copy(update={"tracking": TrackingConfig(mlflow=None)})
    origins.record(folder, recipe.sections())
    write_whole(folder / run_folder.RECIPE, recipe.to_yaml().encode())
    state = {
        "recipe_hash": trained.recipe.hash,
        checkpoint.EXPORTED: trained.weights,
        "exported_weights_hash": trained.weights_hash,
    }
    tensors = {"model": {name: value.cpu() for name, value in trained.model.state_dict().items()}}
    keep = checkpoint.Keep(1)
    checkpoint.write(folder / "checkpoints", trained.step, tensors, state, keep=keep, exported=True)
    if (classes := number_of_classes(trained)) is not None:
        class_table.write(folder, class_table.read(trained.folder, classes))
    _copy_mixture(trained, folder / "gmm")
    if code_prior.of_weights(trained.folder, trained.model, trained.identity) is not None:
        (folder / code_prior.FOLDER).mkdir()
        for name in (code_prior.TENSORS, code_prior.DETAILS):
            shutil.copyfile(trained.folder / code_prior.FOLDER / name, folder / code_prior.FOLDER / name)


def _copy_mixture(trained: Trained, target: Path) -> None:
    """Copy the run's mixture. A mixture fitted to the other kind of weights is left out, with a message."""
    source = trained.folder / "gmm"
    if (source / FOLDER).is_dir() and (count := number_of_classes(trained)) is not None:
        load_by_class(source, count, **trained.identity)
        shutil.copytree(source / FOLDER, target / FOLDER)
    if not (source / mixture_files.DETAILS).is_file():
        return
    if mixture_files.read_details(source).get("weights", trained.weights) != trained.weights:
        say(f"{source} is left out: it was fitted to other weights than the {trained.weights} ones")
        return
    mixture_files.load(source, **trained.identity)
    target.mkdir(exist_ok=True)
    for name in (mixture_files.TENSORS, mixture_files.DETAILS):
        shutil.copyfile(source / name, target / name)
