"""The contract of an objective: per-example Terms in, one number out. Only the objective reduces over the batch."""

from typing import Protocol

from torch import Tensor

from vaescale import noise
from vaescale.adversaries.discriminators import Discriminators
from vaescale.models.vae import Terms
from vaescale.perceptual.distance import Distance


class Objective(Protocol):
    """A loss, built from its recipe section and the model."""

    importance_samples: int
    """The number of draws of z per image that the loss weighs; 0 for one draw without weights."""

    doubly_reparameterized: bool
    """Whether the weights' gradient for the encoder passes through z only (see `iwae.py`)."""

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """A rank's share of the loss [] in nats per image, and terms of it [] that are logged as train/NAME.

        The mean of the ranks' shares is the global batch's loss.
        """

    def progress(self, step: int) -> dict[str, float]:
        """Values that change over training, logged as train/NAME."""


def distance_of(objective: Objective | None) -> Distance | None:
    """The perceptual distance of an objective, the attribute `distance`; None of one that has none."""
    return getattr(objective, "distance", None)


def discriminators_of(objective: Objective | None) -> Discriminators | None:
    """The attribute `discriminators` of an objective that has a second player; None of one that has none."""
    return getattr(objective, "discriminators", None)
