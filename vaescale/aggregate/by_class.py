"""The latents of each class of images."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale.aggregate.latents import ShardLatents
from vaescale.data.index import parse_entries
from vaescale.data.latent_shards import LatentShards
from vaescale.errors import UserError
from vaescale.mixtures.points import Points


def labels_of(shards: LatentShards) -> NDArray[np.int64]:
    """The classes of all images of latent shards in order, int64 [N] (-1: none)."""
    table = shards.index.shards
    entries = [
        parse_entries((shards.folder / shard.entries_name).read_bytes(), shard, str(shards.folder))
        for shard in table
    ]
    return np.concatenate([part["label"].astype(np.int64) for part in entries])


def of_class(latents: Points | ShardLatents, labels: NDArray[np.int64], number: int) -> Points:
    """This rank's latents of the images of a class, numbered within the class. All ranks call it.

    labels: of all images, in order. Raises UserError for latents that are too many to be held in memory.
    """
    if not isinstance(latents, Points):
        raise UserError(
            f"--per-class holds the latents in memory, and {latents.count} of {latents.size} values are too many; leave it out"
        )
    of_each = latents.count // len(labels)
    is_class = labels == number
    position = torch.from_numpy(np.cumsum(is_class) - 1)
    images = latents.numbers // of_each
    mask = torch.from_numpy(is_class)[images]
    numbers = position[images] * of_each + latents.numbers % of_each

    def part(values: Tensor) -> Tensor:
        return values[mask.to(values.device)]

    variance = None if latents.variance is None else part(latents.variance)
    return Points(part(latents.z), variance, numbers=numbers[mask])
