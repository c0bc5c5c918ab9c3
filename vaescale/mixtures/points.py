"""This rank's share of latents in memory, and the protocol of moments of q(z|x)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vaescale import comm


class Moments(Protocol):
    """This rank's share of the means and variances of q(z|x)."""

    @property
    def size(self) -> int:
        """The number Z of latents per image."""
        ...

    @property
    def count(self) -> int:
        """The number of images, over all ranks."""
        ...

    @property
    def numbers(self) -> Tensor:
        """The numbers of this rank's images in the order of `parts`, int64 [n]."""
        ...

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield means and variances [n, Z], the same at every call."""
        ...

    def rows(self, wanted: Tensor) -> Tensor:
        """The means with these numbers (int64 [M], ascending), of all ranks, on every rank: float64 [M, Z]."""
        ...

    def variances(self, wanted: Tensor) -> Tensor:
        """The variances of the latents with these numbers, as `rows`."""
        ...


@dataclass(frozen=True)
class Scaled:
    """Moments of (z - shift) / scale, with shift and scale [Z]."""

    moments: Moments
    shift: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        """The number Z of latents per image."""
        return self.moments.size

    @property
    def count(self) -> int:
        """The number of images, over all ranks."""
        return self.moments.count

    @property
    def numbers(self) -> Tensor:
        """The numbers of this rank's images in the order of `parts`, int64 [n]."""
        return self.moments.numbers

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield scaled means and variances [n, Z]."""
        for mean, variance in self.moments.parts():
            assert variance is not None, "expected moments, got draws"
            scale = self.scale.to(mean)
            yield (mean - self.shift.to(mean)) / scale, variance / scale.square()

    def rows(self, wanted: Tensor) -> Tensor:
        """The scaled means with these numbers, on every rank: float64 [M, Z]."""
        return (self.moments.rows(wanted) - self.shift.double()) / self.scale.double()

    def variances(self, wanted: Tensor) -> Tensor:
        """The scaled variances with these numbers, on every rank: float64 [M, Z]."""
        return self.moments.variances(wanted) / self.scale.double().square()


class Points:
    """Draws z [n, Z] of this rank, or the means and variances [n, Z] of q(z|x) for its images.

    numbers: int64 [n], the position of each latent among those of all ranks; by default this rank has all latents.
    """

    def __init__(self, z: Tensor, variance: Tensor | None = None, *, numbers: Tensor | None = None) -> None:
        self.z, self.variance = z, variance
        self.numbers = torch.arange(len(z)) if numbers is None else numbers
        self.size = z.shape[1]
        self.count = int(comm.all_reduce_sum(torch.tensor([float(len(z))]))[0])

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield all latents of this rank at once."""
        yield self.z, self.variance

    def rows(self, wanted: Tensor) -> Tensor:
        """The latents with these numbers (int64 [M], ascending), of all ranks, on every rank: float64 [M, Z]."""
        return self._gathered(self.z, wanted)

    def variances(self, wanted: Tensor) -> Tensor:
        """The variances of the latents with these numbers, as `rows`."""
        assert self.variance is not None, "expected moments, got draws"
        return self._gathered(self.variance, wanted)

    def _gathered(self, values: Tensor, wanted: Tensor) -> Tensor:
        position = torch.searchsorted(wanted, self.numbers).clamp_max(len(wanted) - 1)
        mask = wanted[position] == self.numbers
        rows = torch.zeros(len(wanted), self.size, dtype=torch.float64)
        rows[position[mask]] = values[mask.to(values.device)].double().cpu()
        return comm.all_reduce_sum(rows.flatten()).view(rows.shape)
