"""Learned vectors of conditions, by which the blocks of a network scale and shift their channels.

Legend: B images, K classes, V values of a vector, E = condition.width; y of classes int64 [B] from 0 to K - 1, NONE where the class is hidden
or unknown; y of vectors float32 [B, V], NaN where the vector is hidden or unknown.
"""

import torch
from torch import Tensor, nn

from vaescale.conditions.config import ClassCondition, ConditionConfig, VectorCondition

NONE = -1
"""The label of an image whose class is hidden or not known."""


class ClassEmbedding(nn.Module):
    """A vector for each class, and one for NONE if the recipe hides classes."""

    def __init__(self, config: ClassCondition) -> None:
        super().__init__()
        self.classes, self.hides = config.classes, config.dropout > 0
        self.table = nn.Embedding(config.classes + self.hides, config.width)

    def forward(self, y: Tensor) -> Tensor:
        """Map y int64 [B], or shares of the classes [B, K], to vectors float32 [B, E]."""
        return rows_of(self.table, y, self.classes)


class VectorEmbedding(nn.Module):
    """A linear map of a vector, and a learned vector for NaN if the recipe hides vectors.

    The moments of the standardization are a part of the state: `measured` sets them, before training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: VectorCondition) -> None:
        super().__init__()
        self.standardizes = config.standardize
        self.map = VectorMap(config, config.width)
        nn.init.normal_(self.map.linear.weight, std=config.size**-0.5)  # so that E values have unit variance
        self.register_buffer("mean", torch.zeros(config.size))
        self.register_buffer("deviation", torch.ones(config.size))

    def forward(self, y: Tensor) -> Tensor:
        """Map vectors [B, V], as `standardized` returns them, to vectors float32 [B, E]."""
        mapped: Tensor = self.map(y)
        return mapped

    def measured(self, mean: Tensor, deviation: Tensor) -> None:
        """Standardize by these moments [V] of the training images; a value that all of them share is not divided."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def standardized(self, y: Tensor) -> Tensor:
        """Vectors [B, V] as `forward` takes them: standardized if the recipe says so."""
        return (y - self.mean) / self.deviation if self.standardizes else y


class VectorMap(nn.Module):
    """A linear map without a bias, and a learned vector for NaN if the recipe hides vectors. A one-hot vector has a row of its own, as a
    class has.
    """

    def __init__(self, config: VectorCondition, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.size, width, bias=False)
        self.none = nn.Embedding(1, width) if config.dropout else None

    def forward(self, y: Tensor) -> Tensor:
        """Map vectors [B, V] to [B, width]."""
        is_none = y.isnan().any(1, keepdim=True)
        mapped: Tensor = self.linear(torch.where(is_none, 0.0, y).to(self.linear.weight.dtype))
        return (
            mapped if self.none is None else torch.where(is_none, self.none(is_none[:, 0].long() * 0), mapped)
        )


class ConditionPrior(nn.Module):
    """Mean and raw log sigma of p(z|y), N(0, I) at first: for each class, and for NONE if the recipe hides classes, or by a linear map of
    vectors.
    """

    def __init__(self, config: ConditionConfig, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        self.table: nn.Embedding | None = None
        width = 2 * torch.Size(latent_shape).numel()
        if isinstance(config, ClassCondition):
            self.classes = config.classes
            self.table = nn.Embedding(config.classes + (config.dropout > 0), width)
        elif isinstance(config, VectorCondition):
            self.map = VectorMap(config, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map y as the embeddings take it to the mean and the raw log sigma, float32 [B, *latent_shape] each."""
        both = self.map(y) if self.table is None else rows_of(self.table, y, self.classes)
        mu, log_sigma = both.chunk(2, dim=1)
        return mu.reshape(-1, *self.latent_shape), log_sigma.reshape(-1, *self.latent_shape)


def rows_of(table: nn.Embedding, y: Tensor, classes: int) -> Tensor:
    """The rows of a table, [B, N], of classes y int64 [B], where NONE has the row after the last class; of shares of the classes y [B, K],
    the mean of the rows.
    """
    if y.is_floating_point():
        mean: Tensor = y.to(table.weight) @ table.weight[:classes]
        return mean
    rows: Tensor = table(torch.where(y < 0, classes, y))
    return rows
