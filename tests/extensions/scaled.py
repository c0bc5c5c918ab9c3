"""A posterior from outside the package: a mean for each latent, and one standard deviation from the recipe."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vaescale.config import ONE_VECTOR, Need
from vaescale.models.config import PosteriorConfig
from vaescale.models.posterior import Gaussian, Posterior


class Scaled(Posterior):
    """raw [B, Z]: the mean."""

    def __init__(self, config: "ScaledConfig", latents: int) -> None:
        super().__init__(config, latents)
        self.log_sigma = math.log(config.sigma)

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:
        return Gaussian(raw, torch.full_like(raw, self.log_sigma))


class ScaledConfig(PosteriorConfig):
    """One constant standard deviation."""

    implementation = Scaled
    kind: Literal["scaled"] = "scaled"
    sigma: float = Field(gt=0, description="standard deviation of every latent")

    def num_params(self, latents: int) -> int:
        return latents

    def needs(self) -> Iterable[Need]:
        yield Need("posterior.kind (='scaled')", ONE_VECTOR, "choose diagonal")
