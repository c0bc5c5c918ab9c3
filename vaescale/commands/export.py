"""A trained run as MLflow's python_function: `mlflow.pyfunc.load_model(OUT)` calls `_load_pyfunc`, and no pickle is loaded.

predict(images, params) takes uint8 images [N, C, H, W] and returns float32: with params {"mode": ...}

    reconstruct (default)   decoded means of the posterior's means, [N, C, H, W]
    encode                  the posterior's means, [N, Z]
    sample                  N samples, [N, C, H, W]; the images say only how many. "prior": standard or gmm, "decode": mean, ancestral
                            or offset:ALPHA, "temperature", "seed"
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import noise
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.errors import UserError
from vaescale.mixtures import files
from vaescale.trained import open_trained

MODES = ("reconstruct", "encode", "sample")
DEFAULTS: dict[str, Any] = {
    "mode": "reconstruct",
    "prior": "standard",
    "decode": "mean",
    "temperature": 1.0,
    "seed": 0,
}
BATCH = 250


class Served:
    """What MLflow calls."""

    def __init__(self, folder: Path) -> None:
        self.trained = open_trained(folder)
        fitted = folder / "gmm"
        self.mixture = files.load(fitted) if fitted.is_dir() else None

    @torch.no_grad()
    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """As the module says. Raises UserError for other images or params."""
        images = np.asarray(model_input)
        given = {**DEFAULTS, **(params or {})}
        unknown = given.keys() - DEFAULTS.keys()
        if unknown or given["mode"] not in MODES:
            raise UserError(
                f"params {sorted(unknown) or given['mode']!r} are unknown; mode is one of {', '.join(MODES)}, the others are "
                f"{', '.join(list(DEFAULTS)[1:])}"
            )
        if given["prior"] not in ("standard", "gmm") or not 0 < float(given["temperature"]) <= 10:
            raise UserError(
                f"prior {given['prior']!r} or temperature {given['temperature']} is none; take standard or gmm, and a "
                "temperature above 0 and at most 10"
            )
        shape = self.trained.model.image_shape
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"images of {images.dtype} {list(images.shape)}; give uint8 [N, {', '.join(map(str, shape))}]"
            )
        numbers = torch.split(torch.arange(len(images)), BATCH)
        parts = [self._answer(images[part.numpy()], part, given) for part in numbers]
        return np.concatenate(parts)

    def _answer(self, images: NDArray[np.uint8], numbers: Any, given: dict[str, Any]) -> NDArray[np.float32]:
        model, likelihood = self.trained.model, self.trained.model.likelihood
        device = next(model.parameters()).device
        stream = noise.Stream(int(given["seed"]), 0, numbers.to(device))
        if given["mode"] == "sample":
            mixture = self.mixture if given["prior"] == "gmm" else None
            if given["prior"] == "gmm" and mixture is None:
                raise UserError(
                    "this model has no mixture; fit one with `vaescale fit-gmm RUN` before `vaescale export`"
                )
            params = from_latents(model, mixture, stream, float(given["temperature"]))
            found = image_of(likelihood, params, parse_decoding(str(given["decode"])), stream)
        else:
            x = model.target(torch.from_numpy(images).to(device), stream)
            found = model.posterior(x).mu.flatten(1)
            if given["mode"] == "reconstruct":
                found = likelihood.mean(model.reconstruct(x))
        answer: NDArray[np.float32] = found.float().cpu().numpy()
        return answer


def _load_pyfunc(data_path: str) -> Served:
    """What MLflow calls to load the model."""
    return Served(Path(data_path))
