"""The model that MLflow calls: `mlflow.pyfunc.load_model(OUT)` calls `_load_pyfunc`, which opens OUT/data/run.

predict(images, params) takes images as `data/given_images.py` describes, uint8 or real numbers in [0, 1], [N, C, H, W] or [N, H, W, C], as arrays
or nested lists, and returns float32; a model of another depth takes the values of its shards and returns images as such values. By
params["mode"]:

    reconstruct (default)   decoded means of the posterior's means, in the images' order of axes
    encode                  the posterior's means, [N, Z]; of a model with codes, their vectors
    sample                  N samples, in the images' order of axes, the number of images sets N; "prior": standard, gmm or
                            autoregressive (over codes), "decode": mean, ancestral or offset:ALPHA, "temperature", "seed"

params["classes"] of a conditional model: a class for all images, or one for each, separated by commas: names, numbers, or `none` where classes
were hidden in training. params["vectors"] of a model that is given vectors: one for all images, such as "1,0,0.5", or one for each, separated by
semicolons; or `none`.

What cannot be answered is refused with one sentence, which `mlflow models serve` returns with the status 400.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import noise
from vaescale.aggregate import code_prior
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.commands.chosen_vectors import as_vectors
from vaescale.conditions.config import ClassCondition, VectorCondition
from vaescale.conditions.embedding import NONE
from vaescale.config import Window
from vaescale.data.given_images import as_levels, in_layout
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.by_class import FOLDER, load_by_class
from vaescale.models.units import to_stored
from vaescale.models.vae import VAE
from vaescale.runs import class_table, origins
from vaescale.runs import folder as run_folder
from vaescale.runs.requests import refusal, refuse_unknown_params
from vaescale.trained import number_of_classes, open_trained

MODES = ("reconstruct", "encode", "sample")
PRIORS = ("standard", "gmm", "autoregressive")
DEFAULTS: dict[str, Any] = {
    "mode": "reconstruct",
    "prior": "standard",
    "decode": "mean",
    "temperature": 1.0,
    "seed": 0,
    "classes": "",
    "vectors": "",
}
MOST_TEMPERATURE = 10
BATCH = 250
PACKAGES = (
    *(
        "einops",
        "filelock",
        "numpy",
        "omegaconf",
        "pillow",
        "psutil",
        "pydantic",
        "pyyaml",
        "rich",
        "safetensors",
    ),
    *("simplejpeg", "torch"),
)
"""What this module imports, of vaescale's requirements."""


class Served:
    """The model that MLflow calls: an opened exported run."""

    def __init__(self, folder: Path) -> None:
        self.trained = open_trained(folder)
        mixture, classes = folder / "gmm", number_of_classes(self.trained)
        self.of_classes = (
            load_by_class(mixture, classes) if classes is not None and (mixture / FOLDER).is_dir() else None
        )
        self.mixture = mixture_files.load(mixture) if (mixture / mixture_files.DETAILS).is_file() else None
        self.code_prior = code_prior.of_weights(folder, self.trained.model, self.trained.identity)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """Reconstruct, encode or sample, as the module docstring describes. Raises UserError, in MLflow's form, for other images or params."""
        try:
            return self._predict(model_input, {**DEFAULTS, **(params or {})})
        except UserError as error:
            raise refusal(str(error)) from None

    @torch.no_grad()
    def _predict(self, model_input: Any, params: dict[str, Any]) -> NDArray[Any]:
        _refuse_unknown(params)
        model = self.trained.model
        levels = as_levels(model_input, model.image_shape, window=model.window)
        batches = torch.split(torch.arange(len(levels.images)), BATCH)
        y = self._condition(str(params["classes"]), str(params["vectors"]), len(levels.images))
        answer = np.concatenate(
            [
                self._answer(levels.images[slots.numpy()], slots, None if y is None else y[slots], params)
                for slots in batches
            ]
        )
        return answer if params["mode"] == "encode" else in_layout(answer, levels.layout)

    def _condition(self, classes: str, vectors: str, images: int) -> torch.Tensor | None:
        """The class or the vector of each image, int64 [N] or float32 [N, V]; None of an unconditional model. Raises UserError."""
        condition = self.trained.model.condition
        kinds = {"classes": (classes, ClassCondition), "vectors": (vectors, VectorCondition)}
        for name, (text, kind) in kinds.items():
            if text and not isinstance(condition, kind):
                given = f"is given {condition.words}" if condition else "has no condition"
                raise UserError(f"{name} (={text!r:.80}) has no meaning: this model {given}; leave it out")
        if isinstance(condition, VectorCondition):
            rows = as_vectors(vectors or "none", condition)
            if len(rows) not in (1, images):
                raise UserError(
                    f"vectors has {len(rows)} rows for {images} images; give one for all, or one for each"
                )
            return rows.expand(images, -1)
        return self._classes(classes, images) if isinstance(condition, ClassCondition) else None

    def _classes(self, text: str, images: int) -> torch.Tensor:
        """The class of each image, int64 [N]. Raises UserError."""
        condition, words = self.trained.model.condition, [word.strip() for word in text.split(",") if text]
        assert isinstance(condition, ClassCondition)
        table = class_table.read(self.trained.folder, condition.classes)
        if len(words) not in (1, images):
            raise UserError(
                f"classes (={text!r}) names {len(words)} classes for {images} images; give one for all, or one for each"
            )
        numbers = [NONE if word == "none" else table.number_of(word) for word in words]
        return torch.tensor(numbers).expand(images)

    def _answer(
        self, images: NDArray[Any], slots: torch.Tensor, y: torch.Tensor | None, params: dict[str, Any]
    ) -> NDArray[Any]:
        model = self.trained.model.given(y)
        device = next(model.parameters()).device
        stream = noise.Stream(int(params["seed"]), 0, slots.to(device))
        if params["mode"] == "sample":
            answer = self._samples(model, y, stream, params)
        else:
            x = model.target(torch.from_numpy(images).to(device), stream)
            if params["mode"] == "encode":
                answer = model.joint_means(x, 1) if model.num_codes else model.posterior(x).mu.flatten(1)
            else:
                answer = model.likelihood.mean(model.reconstruct(x))
        if params["mode"] != "encode" and model.window != Window():
            answer = to_stored(answer, model.window)
            return answer.cpu().numpy()
        array: NDArray[np.float32] = answer.float().cpu().numpy()
        return array

    def _samples(
        self, model: VAE, y: torch.Tensor | None, stream: noise.Stream, params: dict[str, Any]
    ) -> torch.Tensor:
        decoding, temperature = parse_decoding(str(params["decode"])), float(params["temperature"])
        if params["prior"] == "gmm" and self.of_classes is not None and y is not None:
            z = self.of_classes.draws(y.to(stream.slots.device), stream, temperature)
            return image_of(model.likelihood, model.decode(z, stream, temperature), decoding, stream)
        prior = {"gmm": self.mixture, "autoregressive": self.code_prior}.get(params["prior"])
        if params["prior"] == "gmm" and prior is None:
            raise UserError(
                "this model has no mixture; fit one with `vaescale fit-gmm RUN` before `vaescale export`"
            )
        if params["prior"] == "autoregressive" and prior is None:
            raise UserError(
                "this model has no prior over codes; fit one with `vaescale fit-prior RUN` before `vaescale export`"
            )
        decoded = from_latents(model, prior, stream, temperature)
        return image_of(model.likelihood, decoded, decoding, stream)


def _refuse_unknown(params: dict[str, Any]) -> None:
    unknown = params.keys() - DEFAULTS.keys()
    if unknown:
        raise UserError(f"unknown params {', '.join(sorted(unknown))}; known: {', '.join(DEFAULTS)}")
    if params["mode"] not in MODES:
        raise UserError(f"mode (={params['mode']!r}) must be one of {', '.join(MODES)}")
    if params["prior"] not in PRIORS or not 0 < float(params["temperature"]) <= MOST_TEMPERATURE:
        raise UserError(
            f"prior (={params['prior']!r}) must be one of {', '.join(PRIORS)}, and temperature (={params['temperature']}) above 0 and "
            f"at most {MOST_TEMPERATURE}"
        )


def _load_pyfunc(data_path: str) -> Served:
    """Load an exported run. MLflow calls it by this name, with the path of OUT/data/run.

    Kinds from outside are imported only from OUT/code, which came with the model and which MLflow has put on the path: who loads an MLflow
    model runs its code. Any other run folder causes no import.
    """
    refuse_unknown_params(DEFAULTS)
    folder = Path(data_path)
    code = folder.parents[1] / "code"
    for origin in run_folder.read_json(folder / origins.FILE).values():
        root = str(origin.get("module", "")).partition(".")[0]
        if root.isidentifier() and (
            (code / f"{root}.py").is_file() or (code / root / "__init__.py").is_file()
        ):
            importlib.import_module(origin["module"])
    return Served(folder)
