"""An objective from outside the package: -log p(x|z) plus the squared KL, which has no paper behind it."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.config import ObjectiveConfig


class Squared:
    """The mean over images of -log p(x|z) + weight KL^2."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: "SquaredConfig", model: VAE) -> None:
        self.weight = config.weight

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        squared = terms.kl.sum(1).square().mean()
        return self.weight * squared - terms.log_px.mean(), {"squared_kl": squared}

    def progress(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


class SquaredConfig(ObjectiveConfig):
    """-log p(x|z) + weight KL^2."""

    implementation = Squared
    kind: Literal["squared"] = "squared"
    weight: float = Field(default=0.1, ge=0, description="weight of the squared KL")
