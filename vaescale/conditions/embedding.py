"""Learned vectors of classes, by which the blocks of a network scale and shift their channels.

Legend: B images, K classes, E = condition.width; y int64 [B] from 0 to K - 1, or NONE where the class is hidden or unknown.
"""

import torch
from torch import Tensor, nn

from vaescale.conditions.config import ClassCondition

NONE = -1
"""The label of an image whose class is hidden or not known."""


class ClassEmbedding(nn.Module):
    """A vector for each class, and one for NONE if the recipe hides classes."""

    def __init__(self, config: ClassCondition) -> None:
        super().__init__()
        self.classes, self.hides = config.classes, config.dropout > 0
        self.table = nn.Embedding(config.rows, config.width)

    def forward(self, y: Tensor) -> Tensor:
        """Map y int64 [B], or shares of the classes [B, K], to vectors float32 [B, E]."""
        return rows_of(self.table, y, self.classes)


class ClassPrior(nn.Module):
    """Mean and raw log sigma of p(z|y) for each class, and for NONE if the recipe hides classes; N(0, I) at first."""

    def __init__(self, config: ClassCondition, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.classes, self.latent_shape = config.classes, latent_shape
        self.table = nn.Embedding(config.rows, 2 * torch.Size(latent_shape).numel())
        nn.init.zeros_(self.table.weight)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map y as in `ClassEmbedding` to the mean and the raw log sigma, float32 [B, *latent_shape] each."""
        mu, log_sigma = rows_of(self.table, y, self.classes).chunk(2, dim=1)
        return mu.view(-1, *self.latent_shape), log_sigma.view(-1, *self.latent_shape)


def rows_of(table: nn.Embedding, y: Tensor, classes: int) -> Tensor:
    """The rows of a table, [B, N], of classes y int64 [B], where NONE has the row after the last class; of shares of the classes y [B, K],
    the mean of the rows.
    """
    if y.is_floating_point():
        mean: Tensor = y.to(table.weight) @ table.weight[:classes]
        return mean
    rows: Tensor = table(torch.where(y < 0, classes, y))
    return rows
