"""Export a trained run as MLflow's python_function: `mlflow.pyfunc.load_model(OUT)` calls `_load_pyfunc` and loads no pickle.

predict(images, params) takes uint8 images [N, C, H, W] and returns float32, by params["mode"]:

    reconstruct (default)   decoded means of the posterior's means, [N, C, H, W]
    encode                  the posterior's means, [N, Z]; of a model with codes, their vectors
    sample                  N samples, [N, C, H, W], the number of images sets N; "prior": standard or gmm, "decode":
                            mean, ancestral or offset:ALPHA, "temperature", "seed"

OUT/data/run is a run folder with the recipe, one kind of weights without an optimizer state, and the mixture if the run has one.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vaescale import noise
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.commands.export_diffusers import Scaling, export_diffusers
from vaescale.commands.export_onnx import export_onnx
from vaescale.commands.export_torch import export_torch
from vaescale.commands.hub import check_hub, push_folder
from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.runs import checkpoint, mlflow_state, origins
from vaescale.runs import folder as run_folder
from vaescale.runs.mlflow import Model, log_model, save_model
from vaescale.runs.mlflow_state import store_uri
from vaescale.runs.tracking import TrackingConfig
from vaescale.system.console import say
from vaescale.system.files import write_whole
from vaescale.trained import Trained, Weights, open_trained

MODES = ("reconstruct", "encode", "sample")
DEFAULTS: dict[str, Any] = {
    "mode": "reconstruct",
    "prior": "standard",
    "decode": "mean",
    "temperature": 1.0,
    "seed": 0,
}
MOST_TEMPERATURE = 10
BATCH = 250
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
) -> dict[str, Any]:
    """Write a run to OUT, which must not exist, in one of FORMATS. Returns the path, the size and what was exported.

    format: `diffusers` writes an AutoencoderKL, whose factors are those of the latents of the first `latent_images` training
    images; 0: a factor of 1. scaling: one factor and shift for `all` channels, or the moments of each `channel`. `torch_export` and
    `onnx` write encoder and decoder as graphs (see `graphs.py`). weights: `ema` takes the averaged weights when the run has them. log:
    also add the model to the run in MLflow, and return its URI. push_to_hub: the name of a model repository, OWNER/NAME, to which
    OUT is sent with a model card. Raises UserError when the run cannot be opened, or when MLflow does not have the run and `log` is set.
    """
    if out.exists():
        raise UserError(f"{out} already exists; delete it or choose another OUT")
    if format != "mlflow" and log:
        raise UserError(f"--log adds MLflow models, and {format} is none; leave one of the two out")
    if push_to_hub:
        check_hub(push_to_hub)
    trained = open_trained(run, weights=weights)
    result = {"out": str(out), **FORMATS[format](trained, out, Options(log, scaling, latent_images))}
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
        model = Model(data, __name__, trained.model.image_shape, DEFAULTS, details)
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


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_run(trained: Trained, folder: Path) -> None:
    """Write a run folder that `open_trained` opens and that cannot be trained: recipe, weights and mixture."""
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
    _copy_mixture(trained, folder / "gmm")


def _copy_mixture(trained: Trained, target: Path) -> None:
    """Copy the run's mixture. A mixture fitted to the other kind of weights is left out, with a message."""
    source = trained.folder / "gmm"
    if not source.is_dir():
        return
    if mixture_files.read_details(source).get("weights", trained.weights) != trained.weights:
        say(f"{source} is left out: it was fitted to other weights than the {trained.weights} ones")
        return
    mixture_files.load(source, **trained.identity)
    target.mkdir()
    for name in (mixture_files.TENSORS, mixture_files.DETAILS):
        shutil.copyfile(source / name, target / name)


class Served:
    """The model that MLflow calls: an opened exported run."""

    def __init__(self, folder: Path) -> None:
        self.trained = open_trained(folder)
        mixture = folder / "gmm"
        self.mixture = mixture_files.load(mixture) if mixture.is_dir() else None

    @torch.no_grad()
    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Reconstruct, encode or sample, as the module docstring describes. Raises UserError for other images or params."""
        images = np.asarray(model_input)
        params = {**DEFAULTS, **(params or {})}
        _refuse_unknown(params)
        shape = self.trained.model.image_shape
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"images of {images.dtype} {list(images.shape)}; give uint8 [N, {', '.join(map(str, shape))}]"
            )
        batches = torch.split(torch.arange(len(images)), BATCH)
        return np.concatenate([self._answer(images[slots.numpy()], slots, params) for slots in batches])

    def _answer(
        self, images: NDArray[np.uint8], slots: torch.Tensor, params: dict[str, Any]
    ) -> NDArray[np.float32]:
        model = self.trained.model
        device = next(model.parameters()).device
        stream = noise.Stream(int(params["seed"]), 0, slots.to(device))
        if params["mode"] == "sample":
            answer = self._samples(stream, params)
        else:
            x = model.target(torch.from_numpy(images).to(device), stream)
            if params["mode"] == "encode":
                answer = model.joint_means(x, 1) if model.num_codes else model.posterior(x).mu.flatten(1)
            else:
                answer = model.likelihood.mean(model.reconstruct(x))
        array: NDArray[np.float32] = answer.float().cpu().numpy()
        return array

    def _samples(self, stream: noise.Stream, params: dict[str, Any]) -> torch.Tensor:
        model = self.trained.model
        mixture = self.mixture if params["prior"] == "gmm" else None
        if params["prior"] == "gmm" and mixture is None:
            raise UserError(
                "this model has no mixture; fit one with `vaescale fit-gmm RUN` before `vaescale export`"
            )
        decoded = from_latents(model, mixture, stream, float(params["temperature"]))
        return image_of(model.likelihood, decoded, parse_decoding(str(params["decode"])), stream)


def _refuse_unknown(params: dict[str, Any]) -> None:
    unknown = params.keys() - DEFAULTS.keys()
    if unknown or params["mode"] not in MODES:
        raise UserError(
            f"params {sorted(unknown) or params['mode']!r} are unknown; mode is one of {', '.join(MODES)}, the other params are "
            f"{', '.join(list(DEFAULTS)[1:])}"
        )
    if params["prior"] not in ("standard", "gmm") or not 0 < float(params["temperature"]) <= MOST_TEMPERATURE:
        raise UserError(
            f"prior (={params['prior']!r}) must be standard or gmm, and temperature (={params['temperature']}) above 0 and "
            f"at most {MOST_TEMPERATURE}"
        )


def _load_pyfunc(data_path: str) -> Served:
    """Load an exported run. MLflow calls it by this name, with the path of OUT/data/run."""
    return Served(Path(data_path))
