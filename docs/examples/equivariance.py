"""Measure how equivariant the decoders of runs with a latent map are: python docs/examples/equivariance.py RUN [RUN ...]

For the first 500 held-out images x, the mean squared error per value of D(T mu) against T x, with mu the mean of q(z|x), by
transformation T; beside it that of the reconstruction D(mu) itself.
"""

import sys
from pathlib import Path

import torch

from vaescale import noise
from vaescale.models.equivariance import Transformation
from vaescale.trained import open_split, open_trained

IMAGES = 500


def main(run: Path) -> None:
    """Print one row for each transformation."""
    trained = open_trained(run)
    model, side = trained.model, trained.model.latent_shape[-1]
    reader = open_split(trained.recipe, "val")
    images = torch.cat([reader[number].images for number in range(IMAGES)])
    half = side // 2
    transformations = {
        "none": Transformation(side, side, 0),
        "a quarter turn": Transformation(side, side, 1),
        "half a turn": Transformation(side, side, 2),
        f"scale {side - 1}/{side}": Transformation(side - 1, side - 1, 0),
        f"scale {half}/{side}": Transformation(half, half, 0),
        f"scale {half}/{side} and a quarter turn": Transformation(half, half, 1),
    }
    with torch.no_grad():
        x = model.target(images, noise.Stream(0, 0, torch.arange(IMAGES)))
        mu = model.posterior(x).mu
        for name, transformation in transformations.items():
            decoded = model.likelihood.mean(model.network.decode(transformation(mu)))
            error = (decoded - transformation(x, x.shape[-1] // side)).square().mean().item()
            print(f"{trained.recipe.name}: {name}: MSE {error:.4f}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
