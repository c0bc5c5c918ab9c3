"""Batches of stored latents for the training of another model, such as a latent diffusion model.

What step s reads is a function of (seed, s, position in the global batch): the plan selects samples as it does for images
(`plan.py`), and z ~ q(z|x) is drawn with noise that depends on (seed, epoch, sample). So any number of ranks and workers reads the
same global batches, and a start at step k costs no reading of the steps before it. A sample's bytes are checked by their crc32.

Legend: B samples of this rank, Z values of a latent.
"""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vaescale import comm, noise
from vaescale.data.config import DataConfig
from vaescale.data.index import INDEX, parse_index
from vaescale.data.latent_format import from_stored
from vaescale.data.latent_shards import latents_of_index
from vaescale.data.order import BLOCK_SAMPLES
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.shard_files import Located, ShardFiles
from vaescale.data.storage import open_store
from vaescale.errors import DataError, UserError


class LatentDataset(IterableDataset[dict[str, Tensor]]):
    """This rank's batches of latents, step by step: give it to a DataLoader with batch_size=None and any number of workers.

    A batch is a dict: `latents` float32 [B, *shape], `labels` int64 [B] (-1: none), `numbers` int64 [B], the samples' numbers in
    the set. To continue after step k, set `start` to k, or build the data set with it.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        global_batch: int,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        sample: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle_block: int = BLOCK_SAMPLES,
    ) -> None:
        """Open the latents at `place`, a folder that `vaescale encode` wrote, or its URL.

        global_batch: samples of a step on all ranks. seed: of the order and of the draws. start, steps: the first step, and
        the step at which the batches end, None for never. sample: draw z ~ q(z|x) at each reading, or choose one of the stored
        draws; False: take the mean, or the first stored draw. rank, world_size: of this process, by default torch.distributed's.
        shuffle_block: samples that are shuffled together, as data.shuffle_block of a recipe. Raises DataError or UserError.
        """
        super().__init__()
        defaults = DataConfig.model_fields
        store = open_store(
            str(place),
            cache=None,
            cache_bytes=defaults["cache_bytes"].default,
            retry_seconds=defaults["retry_seconds"].default,
        )
        index = parse_index(store.read_index(INDEX), str(place))
        self.latents = latents_of_index(index, Path(place))
        self._files = ShardFiles(index, store)
        self.plan = Plan(index.shards.samples, global_batch, seed, shuffle_block)
        self.start, self.steps, self.sample = start, steps, sample
        rank = comm.rank() if rank is None else rank
        world_size = comm.world_size() if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise UserError(f"rank (={rank}) must be from 0 to world_size - 1 (={world_size - 1})")
        (self._slots,) = rank_slots(global_batch, rank=rank, world_size=world_size, accumulation=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a latent, (Z,) or (C, H, W)."""
        return self.latents.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that labels number."""
        return self.latents.index.class_names

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches from `start` on. Of W workers, worker w reads steps w, w + W, ..., which a DataLoader puts in order."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in itertools.count(self.start + first, stride):
            if self.steps is not None and step >= self.steps:
                return
            yield self.batch(step)

    def batch(self, step: int) -> dict[str, Tensor]:
        """This rank's batch of a step. Raises DataError when a sample is damaged."""
        numbers = self.plan.samples(step, self._slots)
        located = self._files.locate(numbers)
        begin = len(self.latents.header)
        rows = np.stack([np.frombuffer(self._content(each), np.uint8)[begin:] for each in located])
        stored = torch.from_numpy(from_stored(rows, self.latents.dtype))
        stored = stored.view(len(rows), self.latents.draws or 2, -1)
        stream = noise.Stream(self.plan.seed, self.plan.epoch(step), torch.from_numpy(numbers))
        return {
            "latents": self._latents(stored, stream).view(-1, *self.shape),
            "labels": torch.tensor([each.label for each in located]),
            "numbers": torch.from_numpy(numbers),
        }

    def unstandardized(self, z: Tensor) -> Tensor:
        """The model's own latents, which its decoder takes, from latents [B, *shape] in the scale of the batches."""
        scale = self.latents.standardized
        if scale is None:
            return z
        channels = (-1, *(1 for _ in self.shape[1:]))
        mean, std = (torch.tensor(values, dtype=z.dtype, device=z.device).view(channels) for values in scale)
        return z * std + mean

    def _latents(self, stored: Tensor, stream: noise.Stream) -> Tensor:
        """One z [B, Z] for each row of moments [B, 2, Z] or draws [B, S, Z]."""
        if not self.sample:
            return stored[:, 0]
        if self.latents.draws:
            chosen = (noise.uniform(stream, noise.POSTERIOR, (1,))[:, 0] * self.latents.draws).long()
            return stored[torch.arange(len(stored)), chosen]
        mean, log_variance = stored.unbind(1)
        epsilon = noise.normal(stream, noise.POSTERIOR, (mean.shape[1],))
        return mean + torch.exp(0.5 * log_variance) * epsilon

    def _content(self, located: Located) -> bytes:
        """The bytes of a sample, checked. A cached shard that the node's disk changed is fetched again once."""
        content = self._files.content(located)
        if self._is_damaged(content, located) and self._files.drop_cached(located.shard):
            content = self._files.content(located)
        if self._is_damaged(content, located):
            name = self.latents.index.shards[located.shard].name
            key = located.key.decode(errors="replace")
            raise DataError(
                f"{self.latents.folder}/{name} member {key!r} is not what was indexed; encode the run again"
            )
        return content

    def _is_damaged(self, content: bytes, located: Located) -> bool:
        return (
            zlib.crc32(content) != located.crc32
            or len(content) != self.latents.member_bytes
            or not content.startswith(self.latents.header)
        )
