"""A mixture for each class of images: p(z|y), to sample from by class."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.mixtures import files
from vaescale.mixtures.gaussian import Mixture, sample

FOLDER = "classes"  # within a run's gmm folder; a folder for each class


class ClassMixtures(NamedTuple):
    """The mixtures of K classes."""

    mixtures: tuple[Mixture, ...]

    @property
    def size(self) -> int:
        """The number Z of latents."""
        return self.mixtures[0].means.shape[1]

    def draws(self, y: Tensor, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """Draws float32 [B, Z] of the classes y int64 [B], one per slot: a function of (seed, step, slot) and the class.

        Raises UserError for an image without a class.
        """
        if int(y.min()) < 0:
            raise UserError("mixtures of classes have none for `none`; give a class, or --prior standard")
        z = torch.empty(len(y), self.size, device=stream.slots.device)
        for number in y.unique().tolist():  # type: ignore[no-untyped-call]
            rows = y == number
            of_class = stream._replace(slots=stream.slots[rows])
            z[rows] = sample(self.mixtures[number], of_class, temperature)
        return z


def load_by_class(gmm: Path, classes: int, **expected: object) -> ClassMixtures:
    """The mixtures of a run's classes. gmm: its gmm folder; expected: as in `files.load`. Raises UserError."""
    return ClassMixtures(
        tuple(files.load(gmm / FOLDER / str(number), **expected) for number in range(classes))
    )
