"""The noise of a model's pictures: images, reconstructions and samples, as decoder means and as ancestral samples."""

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.lookup import evenly, images_at
from vaescale.data.reader import ShardReader
from vaescale.evaluation.noise_level import LEAST_SIZE, noise_level
from vaescale.models.vae import VAE
from vaescale.system.console import Progress

IMAGES, BATCH = 1000, 250
COLUMNS = ("mean", "ancestral")


@torch.no_grad()
def noise_levels(
    model: VAE, reader: ShardReader, draws: Mapping[str, Tensor], *, seed: int, data_seed: int
) -> dict[str, dict[str, float]]:
    """The mean estimated noise of images, their reconstructions, and decoded latents [B, Z] from several sources.

    reader: the training images. data_seed: seed of the images' dequantization noise. Each value is a mean over about a thousand
    pictures. Returns {} for images that are too small for the estimate. All ranks call it.
    """
    if min(model.image_shape[1:]) < LEAST_SIZE:
        return {}
    names = ["images", "reconstructions", *draws]
    sums = torch.zeros(len(names), len(COLUMNS), 2, dtype=torch.float64)
    number = 3 * len(evenly(len(reader), IMAGES)) + 2 * sum(len(z) for z in draws.values())
    with Progress("noise of pictures", number, unit="pictures", shown=comm.is_main()) as progress:
        done = 0
        for name, column, batch in chain(_images(model, reader, data_seed), _samples(model, draws, seed)):
            levels = noise_level(batch.float().clamp(0, 1)).double().cpu()  # clamped as in files and figures
            mean_sums = torch.stack([levels.sum(), levels.new_tensor(float(len(levels)))])
            sums[names.index(name), COLUMNS.index(column)] += mean_sums
            done += len(batch) * comm.world_size()
            progress.update(min(done, number))
    sums = comm.all_reduce_sum(sums.flatten()).view(sums.shape)
    return {
        name: {
            column: float(total / count) for column, (total, count) in zip(COLUMNS, row, strict=True) if count
        }
        for name, row in zip(names, sums, strict=True)
    }


def _images(model: VAE, reader: ShardReader, seed: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield this rank's share of images and reconstructions: row, column and pictures [B, C, H, W]."""
    device = next(model.parameters()).device
    for numbers in torch.split(evenly(len(reader), IMAGES)[comm.rank() :: comm.world_size()], BATCH):
        stream = noise.Stream(seed, 0, numbers.to(device))
        x = model.target(images_at(reader, numbers).to(device), stream)
        params = model.reconstruct(x)
        yield "images", "mean", x
        yield "reconstructions", "mean", model.likelihood.mean(params)
        yield "reconstructions", "ancestral", model.likelihood.sample(params, stream)


def _samples(model: VAE, draws: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the decoded pictures of this rank's share of the latents: row, column and pictures [B, C, H, W]."""
    share = slice(comm.rank(), None, comm.world_size())
    for name, z in draws.items():
        slots = torch.arange(len(z), device=z.device)[share]
        for latents, own_slots in zip(torch.split(z[share], BATCH), torch.split(slots, BATCH), strict=True):
            stream = noise.Stream(seed, 4, own_slots)
            params = model.decode(latents, stream)
            yield name, "mean", model.likelihood.mean(params)
            yield name, "ancestral", model.likelihood.sample(params, stream)
