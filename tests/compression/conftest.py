"""Small models with random weights, each likelihood, and images of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from vaescale import noise
from vaescale.conditions.config import CONDITIONS
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig, IsotropicConfig
from vaescale.models.vae import VAE
from vaescale.networks.config import NETWORKS

CODED: dict[str, dict[str, Any]] = {
    "bernoulli": {"binarize": "threshold"},
    "bitwise": {},
    "categorical": {},
    "discretized_logistic": {},
    "discretized_logistic_mixture": {"components": 3},
    "autoregressive_logistic_mixture": {"components": 2, "radius": 2, "width": 5, "blocks": 1},
}


def small_model(
    kind: str,
    *,
    shape: tuple[int, int, int] = (1, 8, 8),
    network: dict[str, Any] | None = None,
    isotropic: bool = False,
    condition: dict[str, Any] | None = None,
    seed: int = 0,
    scale: float = 1.7,
    **options: Any,
) -> VAE:
    """A model whose weights are large enough for z to matter. scale: of the initial weights."""
    section = {"kind": "conv", "latent_dim": 3, **(network or {})}
    if section["kind"] == "conv":
        section["widths"] = [4]
    built = TypeAdapter(NETWORKS[section["kind"]]).validate_python(section)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_vae(
            built,
            IsotropicConfig() if isotropic else DiagonalConfig(),
            LIKELIHOODS[kind](**{**CODED.get(kind, {}), **options}),
            image_size=shape[1:],
            channels=shape[0],
            condition=CONDITIONS[condition.get("kind", "class")](**condition) if condition else None,
        )
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.mul_(scale)
            for parameter in model.parameters():
                if (
                    parameter.ndim > 1 and not parameter.any()
                ):  # so that the groups above and the class matter
                    parameter.normal_(std=0.3)
    return model.eval()


def sampled_levels(model: VAE, number: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images that the model itself draws, which it finds likely."""
    stream = noise.Stream(seed, 0, torch.arange(number))
    with torch.no_grad():
        x = model.likelihood.sample(model.from_prior(stream), stream)
    return (x * (model.likelihood.levels - 1)).round().to(torch.uint8).numpy()


def random_levels(number: int, shape: tuple[int, int, int], levels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images of smooth noise, with the first and the last level among them."""
    generator = np.random.default_rng(seed)
    walk = generator.integers(-12, 13, (number, *shape)).cumsum(-1) + generator.integers(
        0, 256, (number, 1, 1, 1)
    )
    grey = np.clip(walk, 0, 255).astype(np.uint8)
    return grey if levels == 256 else (grey > 127).astype(np.uint8)
