"""Latents from shards, in memory or read at each pass: draws from q(z|x), a function of (seed, number) only, or its moments.

Rank r of N has the shards r, r + N, ... Latent number n is the n-th of all shards in order; with S draws of each image, draw s
of image n has the number n S + s.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.latent_shards import Block, LatentShards
from vaescale.errors import UserError
from vaescale.mixtures.points import Moments, Points, Scaled
from vaescale.models.vae import VAE

HELD_BYTES = 2 << 30  # for all processes of a node; more latents than that are read from disk at each pass
KEPT_BYTES = 1 << 28  # for shards that are read out of order


class Drawing(NamedTuple):
    """Options for drawing: the number of samples of each image, or 0 for its moments, and the seed.

    If the shards hold draws, the number must be theirs.
    """

    samples: int
    seed: int


class ShardLatents:
    """The latents of shards on `device`, read from disk on demand."""

    def __init__(self, shards: LatentShards, drawing: Drawing, device: torch.device | str = "cpu") -> None:
        self.shards, self.drawing, self.device = shards, drawing, torch.device(device)
        self.size = int(np.prod(shards.shape))
        if shards.standardized:
            raise UserError(
                f"{shards.folder} holds standardized latents, and the model's own are needed; give the folder that "
                "`vaescale encode RUN` writes without --standardize"
            )
        assert shards.draws in (0, drawing.samples), f"the shards hold {shards.draws} draws of each image"
        self.of_each = max(1, drawing.samples)
        self.images = shards.index.num_samples
        self.count = self.images * self.of_each
        self._starts = np.concatenate([[0], np.cumsum(shards.index.shards.samples)])
        self._blocks: OrderedDict[int, Block] = OrderedDict()

    @property
    def shard_numbers(self) -> range:
        """The numbers of this rank's shards."""
        return range(comm.rank(), len(self.shards.index.shards), comm.world_size())

    @property
    def numbers(self) -> Tensor:
        """The numbers of this rank's latents in the order of `parts`, int64 [n]."""
        starts = (self._starts * self.of_each).tolist()
        parts = [torch.arange(starts[number], starts[number + 1]) for number in self.shard_numbers]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield this rank's latents shard by shard: z [n, Z], and the variances in the case of moments."""
        for number in self.shard_numbers:
            z, variance, _ = self._latents(number, self.shards.read(number))
            yield z, variance

    def rows(self, wanted: Tensor) -> Tensor:
        """The latents with these numbers (int64 [M], ascending), of all ranks, on every rank: float64 [M, Z]."""
        return self._gathered(wanted, variances=False)

    def variances(self, wanted: Tensor) -> Tensor:
        """The variances of the latents with these numbers, on every rank: float64 [M, Z]. Only for moments."""
        assert not self.drawing.samples, "expected moments, got draws"
        return self._gathered(wanted, variances=True)

    def _gathered(self, wanted: Tensor, *, variances: bool) -> Tensor:
        rows = torch.zeros(len(wanted), self.size, dtype=torch.float64)
        for number in self.shard_numbers:
            first, last = (int(self._starts[number + end]) * self.of_each for end in (0, 1))
            mask = (wanted >= first) & (wanted < last)
            if mask.any():
                z, variance, _ = self._latents(number, self.shards.read(number))
                values = variance if variances and variance is not None else z
                rows[mask] = values[(wanted[mask] - first).to(z.device)].double().cpu()
        return comm.all_reduce_sum(rows.flatten()).view(rows.shape)

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """The number of latents in each shard."""
        return self.shards.index.shards.samples * self.of_each

    def take(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Latents by number, from any shard, for this rank only: z [M, Z], and the variances in the case of moments."""
        z = torch.empty(len(numbers), self.size, device=self.device)
        variance = None if self.drawing.samples else torch.empty_like(z)
        shards = np.searchsorted(self._starts, numbers // self.of_each, side="right") - 1
        for shard in np.unique(shards):
            mask = torch.from_numpy(shards == shard)
            within = torch.from_numpy(numbers[shards == shard] - self._starts[shard] * self.of_each)
            means, spread, _ = self._latents(int(shard), self._block(int(shard)))
            z[mask] = means[within]
            if variance is not None and spread is not None:
                variance[mask] = spread[within]
        return z, variance

    def held(self) -> Points:
        """Load all latents of this rank into memory. An error on one rank is raised on all."""
        parts = comm.together(
            lambda: [self._latents(number, self.shards.read(number)) for number in self.shard_numbers]
        )
        empty = torch.zeros(0, self.size, device=self.device)
        z = torch.cat([empty, *(shard[0] for shard in parts)])
        spreads = [shard[1] for shard in parts if shard[1] is not None]
        variance = None if self.drawing.samples else torch.cat([empty, *spreads])
        return Points(
            z,
            variance,
            numbers=torch.cat([torch.zeros(0, dtype=torch.int64), *(shard[2] for shard in parts)]),
        )

    def _block(self, number: int) -> Block:
        if number not in self._blocks:
            self._blocks[number] = self.shards.read(number)
        self._blocks.move_to_end(number)
        while (
            len(self._blocks) > 1
            and sum(block.moments.nbytes for block in self._blocks.values()) > KEPT_BYTES
        ):
            self._blocks.popitem(last=False)
        return self._blocks[number]

    def _latents(self, number: int, block: Block) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [n S, Z], the variances in the case of moments, and the numbers of the latents, for one shard."""
        if self.shards.draws:
            first = int(self._starts[number]) * self.of_each
            z = torch.from_numpy(block.moments).to(self.device).flatten(0, 1)
            return z, None, first + torch.arange(len(z))
        mean, log_variance = torch.from_numpy(block.moments).to(self.device).unbind(1)
        images = int(self._starts[number]) + torch.arange(len(mean))
        if not self.drawing.samples:
            return mean.contiguous(), log_variance.exp(), images
        slots, sigma = images.to(self.device), torch.exp(0.5 * log_variance)
        draws = [
            mean
            + sigma
            * noise.normal(noise.Stream(self.drawing.seed, draw, slots), noise.POSTERIOR, (self.size,))
            for draw in range(self.drawing.samples)
        ]
        numbers = images[:, None] * self.of_each + torch.arange(self.of_each)
        return torch.stack(draws, dim=1).flatten(0, 1), None, numbers.flatten()


def load(shards: LatentShards, drawing: Drawing, device: torch.device | str = "cpu") -> Points | ShardLatents:
    """The latents in memory if a process can hold its share, else read from disk at each pass."""
    latents = ShardLatents(shards, drawing, device)
    most = max(
        int(latents.shard_samples[rank :: comm.world_size()].sum()) for rank in range(comm.world_size())
    )
    share = most * latents.size * 4 * (1 if drawing.samples else 2)
    most_ranks = max(
        comm.gather_object(comm.ranks_on_this_node())
    )  # the maximum, so that all nodes decide alike
    return latents.held() if share <= HELD_BYTES // most_ranks else latents


@torch.no_grad()
def in_prior_scale(model: VAE, moments: Moments) -> Moments:
    """Scale latents to deviations from the model's prior in units of its standard deviations."""
    mu, log_sigma = (parameter.flatten().float().cpu() for parameter in model.prior())
    return Scaled(moments, mu, log_sigma.exp())
