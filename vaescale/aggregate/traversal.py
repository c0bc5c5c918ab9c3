"""Decoded means at chosen latents: along lines between the posteriors of images, and over the plane of two latents."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.sampling import line, plane, quantiles
from vaescale.conditions.config import ClassCondition
from vaescale.data.batch import Request
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.models.vae import VAE

STEPS = 10  # points of a line


@torch.no_grad()
def lines_between(
    model: VAE, reader: ShardReader, pairs: Sequence[tuple[int, int]], *, data_seed: int, seed: int
) -> list[NDArray[np.float32]]:
    """Pictures [STEPS + 2, C, H, W] for each pair of image numbers: the first image, a line of decoded means, the second image.

    The line connects the two posterior means, and in a conditional model the classes or vectors of both images. data_seed: seed of the likelihood's target. seed: seed of a ladder's groups below
    the top one. Raises UserError for a number that the reader does not have, and for an unusable image.
    """
    device = next(model.parameters()).device
    lines = []
    for pair in pairs:
        x, y = _targets(model, reader, pair, seed=data_seed)
        mu = model.given(y).posterior(x).mu.flatten(1)
        along = model if y is None else model.given(_between(model, y))
        # The draws of a ladder's lower groups use the same noise at each point of the line.
        stream = noise.Stream(seed, 0, torch.zeros(STEPS, dtype=torch.int64, device=device))
        means = model.likelihood.mean(along.decode(line(mu[0], mu[1], STEPS), stream)).float()
        lines.append(torch.cat([x[:1], means, x[1:]]).cpu().numpy())
    return lines


@torch.no_grad()
def between_conditions(model: VAE, ends: Tensor, *, rows: int, seed: int) -> NDArray[np.float32]:
    """Decoded means [rows, STEPS, C, H, W] of a conditional model from one condition to another, z of a row drawn with the same noise.

    ends: two classes, int64 [2], or two vectors, float32 [2, V].
    """
    device = next(model.parameters()).device
    along = _between(model, ends)
    shares = along.repeat(rows, *[1] * (along.dim() - 1))
    slots = torch.arange(rows, device=device).repeat_interleave(STEPS)
    params = model.given(shares).from_prior(noise.Stream(seed, 0, slots))
    means: NDArray[np.float32] = model.likelihood.mean(params).float().cpu().numpy()
    return means.reshape(rows, STEPS, *means.shape[1:])


def _between(model: VAE, ends: Tensor) -> Tensor:
    """The condition at STEPS points between two of a model: shares of the classes [STEPS, K] or vectors [STEPS, V]; both in turn where one
    is none.
    """
    if bool(ends.isnan().any() if ends.is_floating_point() else (ends < 0).any()):
        return ends.repeat_interleave(STEPS // 2, 0)
    if isinstance(model.condition, ClassCondition):
        ends = torch.nn.functional.one_hot(ends, model.condition.classes).float()
    return line(ends[0], ends[1], STEPS)


def _targets(
    model: VAE, reader: ShardReader, pair: tuple[int, int], *, seed: int
) -> tuple[Tensor, Tensor | None]:
    """The encoder's input for two images, [2, C, H, W], and their condition."""
    if max(pair) >= len(reader):
        raise UserError(f"--interpolate {pair[0]},{pair[1]}: the held-out images are 0 to {len(reader) - 1}")
    fetched = reader.__getitems__(Request(np.array(pair), refill=False))
    if not fetched.usable.all():
        raise UserError(f"--interpolate {pair[0]},{pair[1]}: {fetched.faults[0].words}; take other images")
    device = next(model.parameters()).device
    stream = noise.Stream(seed, 0, torch.tensor(pair, device=device))
    y = model.condition_of(fetched.labels, fetched.vectors)
    return model.target(fetched.images.to(device), stream), y


@torch.no_grad()
def plane_means(model: VAE, side: int, *, seed: int) -> tuple[NDArray[np.float32], list[float]]:
    """Decoded means [side^2, C, H, W] over the plane of two latents, and the values of each latent along it.

    Raises UserError unless the model has exactly two latents.
    """
    if model.latent_dim != 2 or len(model.group_sizes) > 1:
        raise UserError(
            f"--map needs a model with one vector of two latents, this run has {sum(model.group_sizes)}; train a conv network "
            f"with network.latent_dim=2"
        )
    device = next(model.parameters()).device
    along = quantiles(side)
    z = plane(along).to(device)
    stream = noise.Stream(seed, 0, torch.arange(len(z), device=device))
    means: NDArray[np.float32] = model.likelihood.mean(model.decode(z, stream)).float().cpu().numpy()
    return means, along.tolist()
