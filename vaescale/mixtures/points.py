"""Latents that are held in memory, this rank's share of them; and what moments of q(z|x) are, held or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vaescale import comm


class Moments(Protocol):
    """This rank's part of the means and variances of q(z|x)."""

    @property
    def size(self) -> int:
        """Z."""
        ...

    @property
    def count(self) -> int:
        """Images, over all ranks."""
        ...

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Means and variances [n, Z]. The same at every call."""
        ...

    def rows(self, wanted: Tensor) -> Tensor:
        """The means with these numbers (int64 [M], ascending), of all ranks, on every rank: float64 [M, Z]."""
        ...

    def variances(self, wanted: Tensor) -> Tensor:
        """The variances, likewise."""
        ...


@dataclass(frozen=True)
class Scaled:
    """Moments of (z - shift) / scale, with shift and scale [Z]."""

    moments: Moments
    shift: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        """Z."""
        return self.moments.size

    @property
    def count(self) -> int:
        """Images over all ranks."""
        return self.moments.count

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As of the moments."""
        for mean, variance in self.moments.parts():
            assert variance is not None, "these are draws"
            scale = self.scale.to(mean)
            yield (mean - self.shift.to(mean)) / scale, variance / scale.square()

    def rows(self, wanted: Tensor) -> Tensor:
        """As of the moments."""
        return (self.moments.rows(wanted) - self.shift.double()) / self.scale.double()

    def variances(self, wanted: Tensor) -> Tensor:
        """As of the moments."""
        return self.moments.variances(wanted) / self.scale.double().square()


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

    def _gathered(self, values: Tensor, wanted: Tensor) -> Tensor:
        place = torch.searchsorted(wanted, self.numbers).clamp_max(len(wanted) - 1)
        here = wanted[place] == self.numbers
        rows = torch.zeros(len(wanted), self.size, dtype=torch.float64)
        rows[place[here]] = values[here.to(values.device)].double().cpu()
        return comm.all_reduce_sum(rows.flatten()).view(rows.shape)
