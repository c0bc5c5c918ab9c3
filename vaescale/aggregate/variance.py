"""Split of the variance of a model's images into parts from z and from noise: the law of total variance, value by value.

    Var[x] = Var_z(E[x|z]) + E_z(Var[x|z])

and the same split of probabilistic PCA with as many latents, the optimum of a linear decoder with one sigma (Tipping & Bishop
1999; Lucas et al. 2019): with eigenvalues l_1 >= ... >= l_D of the data's covariance, sigma^2 is the mean of the last D - Z,
and the latents have sum_{i<=Z} (l_i - sigma^2).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.aggregate.sampling import deviation
from vaescale.data.batch import Request
from vaescale.data.lookup import evenly
from vaescale.data.reader import ShardReader
from vaescale.models.units import to_unit
from vaescale.models.vae import VAE

MOST_DIMENSIONS = 4096  # maximum values of an image, for the eigenvalues of a D x D matrix
IMAGES = 10_000  # maximum number of images for the data's covariance
BATCH = 250


class Split(NamedTuple):
    """Variance from z and from noise, summed over the values of an image in [0, 1]."""

    latent: float
    observed: float

    @property
    def total(self) -> float:
        """The total variance Var[x], summed over an image's values."""
        return self.latent + self.observed


@torch.no_grad()
def variance_splits(
    model: VAE, reader: ShardReader, draws: Mapping[str, Tensor], *, seed: int
) -> dict[str, Any] | None:
    """Split the variance of the model's images for q(z) and for p(z); add the data's total and the split of probabilistic PCA.

    reader: the training images. draws: latents [B, Z] by source, including `posterior` and `prior`. Returns None for a
    likelihood without a variance. All ranks call it.
    """
    latents = sum(model.group_sizes)
    first = model.likelihood.variance(next(_decoded(model, draws["prior"], seed)))
    if first is None and model.likelihood.sigma is None:
        return None
    splits = {
        "q(z)": model_split(model, _decoded(model, draws["posterior"], seed)),
        "p(z)": model_split(model, _decoded(model, draws["prior"], seed)),
    }
    covariance = data_covariance(_images(reader), model.likelihood.dimensions)
    ppca = ppca_split(covariance, latents)
    if ppca is not None:
        splits[f"pPCA, {latents} latents"] = ppca
    diagonal = covariance.diagonal() if covariance.shape[1] > 1 else covariance
    return {"data_total": float(diagonal.sum()), **{name: split._asdict() for name, split in splits.items()}}


@torch.no_grad()
def model_split(model: VAE, decoded: Iterable[Tensor]) -> Split:
    """Split the variance of a model's images, over all ranks. decoded: batches of raw parameters from draws of z."""
    size = model.likelihood.dimensions
    total = torch.zeros(2 * size + 2, dtype=torch.float64)
    for params in decoded:
        mean = model.likelihood.mean(params).flatten(1).double()
        shape = (len(mean), *model.image_shape)
        observed = deviation(model.likelihood, params).square().double().expand(shape).sum()
        counts = torch.stack([observed, observed.new_tensor(float(len(mean)))])
        sums = [mean.sum(0), mean.square().sum(0), counts]
        total += torch.cat(sums).cpu()
    total = comm.all_reduce_sum(total)
    first, second = (total[:-2] / total[-1]).chunk(2)
    return Split(float((second - first.square()).sum()), float(total[-2] / total[-1]))


def data_covariance(images: Iterable[Tensor], dimensions: int) -> Tensor:
    """The covariance [D, D] of images [B, C, H, W] in [0, 1], float64, over all ranks; only its diagonal for D > 4096."""
    whole = dimensions <= MOST_DIMENSIONS
    second = torch.zeros(dimensions, dimensions if whole else 1, dtype=torch.float64)
    first = torch.zeros(dimensions + 1, dtype=torch.float64)
    for batch in images:
        x = batch.flatten(1).double().cpu()
        second += x.T @ x if whole else x.square().sum(0)[:, None]
        first += torch.cat([x.sum(0), x.new_tensor([float(len(x))])])
    first, second = comm.all_reduce_sum(first), comm.all_reduce_sum(second.flatten()).view(second.shape)
    mean = first[:-1] / first[-1]
    second = second / first[-1]
    return second - (torch.outer(mean, mean) if whole else mean.square()[:, None])


def ppca_split(covariance: Tensor, latents: int) -> Split | None:
    """Split the variance of probabilistic PCA. Returns None with as many latents as values, or for a diagonal covariance."""
    size = len(covariance)
    if covariance.shape[1] != size or latents >= size:
        return None
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0.0)
    variance = float(eigenvalues[latents:].mean())
    return Split(float((eigenvalues[:latents] - variance).clamp_min(0.0).sum()), size * variance)


def _decoded(model: VAE, z: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield the likelihood's raw parameters for this rank's share of latents [B, Z], batch by batch."""
    share = slice(comm.rank(), len(z), comm.world_size())
    slots = torch.arange(len(z), device=z.device)
    for latents, own_slots in zip(
        torch.split(z[share], BATCH), torch.split(slots[share], BATCH), strict=True
    ):
        yield model.decode(latents, noise.Stream(seed, 2, own_slots))


def _images(reader: ShardReader) -> Iterator[Tensor]:
    """Yield this rank's share of evenly spaced images, float [B, C, H, W] in [0, 1]."""
    for numbers in torch.split(evenly(len(reader), IMAGES)[comm.rank() :: comm.world_size()], BATCH):
        fetched = reader.__getitems__(Request(np.asarray(numbers), refill=False))
        yield to_unit(fetched.images[fetched.usable], reader.window)
