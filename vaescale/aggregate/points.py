"""Latents that are held in memory: this rank's share of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vaescale import comm


class Points:
    """z [n, Z] of this rank, or the means and variances [n, Z] of its images' q(z|x).

    numbers: int64 [n], which of all latents each one is; by default this rank has them all.
    """

    def __init__(self, z: Tensor, variance: Tensor | None = None, *, numbers: Tensor | None = None) -> None:
        self.z, self.variance = z, variance
        self.numbers = torch.arange(len(z)) if numbers is None else numbers
        self.size = z.shape[1]
        self.count = int(comm.all_reduce_sum(torch.tensor([float(len(z))]))[0])

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All of them at once."""
        yield self.z, self.variance

    def rows(self, wanted: Tensor) -> Tensor:
        """The latents with these numbers (int64 [M], ascending), of all ranks, on every rank: float64 [M, Z]."""
        return self._gathered(self.z, wanted)

    def variances(self, wanted: Tensor) -> Tensor:
        """Of those latents, likewise."""
        assert self.variance is not None, "these are draws"
        return self._gathered(self.variance, wanted)

    def scaled(self, shift: Tensor, scale: Tensor) -> "Points":
        """(z - shift) / scale, with shift and scale [Z]."""
        variance = None if self.variance is None else self.variance / scale.square()
        return Points((self.z - shift) / scale, variance, numbers=self.numbers)

    def _gathered(self, values: Tensor, wanted: Tensor) -> Tensor:
        place = torch.searchsorted(wanted, self.numbers).clamp_max(len(wanted) - 1)
        here = wanted[place] == self.numbers
        rows = torch.zeros(len(wanted), self.size, dtype=torch.float64)
        rows[place[here]] = values[here.to(values.device)].double().cpu()
        return comm.all_reduce_sum(rows.flatten()).view(rows.shape)
