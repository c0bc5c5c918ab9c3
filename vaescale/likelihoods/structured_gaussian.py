"""Gaussian decoder with correlated residuals: a sparse Cholesky factor of the precision, predicted from z.

    precision = L L^T,  L lower triangular, non-zero where two pixels are neighbours       Dorta et al. 2018
    log p(x|z) = sum log L_jj - |L^T (x - mean(z))|^2 / 2 - D log(2 pi) / 2                 nats

With pixels in raster order, column j of L holds pixel j and its neighbours after it. With
L_ij = c_ij / sigma_j and c_jj = 1, the parameters have a meaning: given the residuals after it, residual j is
N(-sum over neighbours of c_ij e_i, sigma_j^2). The density takes one pass over the neighbours, a sample one sparse
triangular solve.

Legend: r the radius; N = 2 r (r + 1) neighbours after a pixel, in its own channel; a channel also depends on the later
channels of its own pixel, C (C - 1) / 2 pairs.
"""

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.base import Density, decoded_mean, total
from vaescale.likelihoods.config import StructuredGaussianConfig
from vaescale.likelihoods.sigma import floored, wide


class StructuredGaussian(Density):
    """A Gaussian with correlated residuals.

    The decoder returns mean [C], raw log sigma [C], neighbours' coefficients [C N] and channels' coefficients.
    """

    config: StructuredGaussianConfig

    def __init__(self, config: StructuredGaussianConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape)
        if config.radius >= min(image_shape[1:]):
            raise UserError(
                f"likelihood.radius (={config.radius}) must be below data.image_size (={min(image_shape[1:])})"
            )
        self.offsets = offsets_after(config.radius)
        channels = image_shape[0]
        self.pairs = [(early, late) for early in range(channels) for late in range(early + 1, channels)]

    def num_params(self, channels: int) -> int:
        """The number of channels, 2 C + C N + C (C - 1) / 2."""
        return channels * (2 + len(self.offsets)) + channels * (channels - 1) // 2

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The exact log density in nats, [B]."""
        mean, log_sigma, neighbours, between = self._split(params)
        error = x - mean
        given_later = error
        shifted = pad(error, (self.config.radius, self.config.radius, 0, self.config.radius))
        height, width = error.shape[2:]
        for number, (down, right) in enumerate(self.offsets):
            left = self.config.radius + right
            given_later = (
                given_later
                + neighbours[:, :, number] * shifted[:, :, down : down + height, left : left + width]
            )
        channels = list(given_later.unbind(1))
        for number, (early, late) in enumerate(self.pairs):
            channels[early] = channels[early] + between[:, number] * error[:, late]
        given_later = torch.stack(channels, dim=1)
        whitened = given_later * torch.exp(-log_sigma)
        return total(-log_sigma - 0.5 * whitened.square()) - 0.5 * self.dimensions * math.log(2 * math.pi)

    def mean(self, params: Tensor) -> Tensor:
        """The decoded mean [B, C, H, W]."""
        return self._split(params)[0]

    def noise_map(self, params: Tensor) -> tuple[str, Tensor]:
        """The standard deviation of each value given the later ones: the marginal one needs the inverse of a D x D matrix."""
        return "sigma given later pixels", torch.exp(self._split(params)[1])

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw mean + L^-T times noise: a sparse triangular solve for each image, in float64 on the CPU; not clipped."""
        from scipy.sparse.linalg import (
            spsolve_triangular,
        )  # imported here because only samples need it and the import is slow

        mean, log_sigma, neighbours, between = (tensor.detach().double() for tensor in self._split(params))
        white = noise.normal(stream, noise.DECODER, tuple(mean.shape[1:])).double()
        scaled = (white * torch.exp(log_sigma)).cpu().flatten(1).numpy()
        columns = [
            spsolve_triangular(
                self._matrix(n.cpu().numpy(), b.cpu().numpy()), row, lower=False, unit_diagonal=True
            )
            for n, b, row in zip(neighbours, between, scaled, strict=True)
        ]
        error = torch.from_numpy(np.stack(columns)).view_as(mean).to(mean)
        return (mean + error).to(wide(params).dtype)

    def _matrix(self, neighbours: np.ndarray, between: np.ndarray) -> Any:
        """The matrix c^T of one image [D, D]: row j holds 1 and the coefficients of the values after value j.

        neighbours [C, N, H, W], between [pairs, H, W]. Values are in the order channel, row, column; the later channels
        of a pixel come after it, so the matrix is upper triangular.
        """
        from scipy import sparse

        values = np.arange(self.dimensions).reshape(self.image_shape)
        _, height, width = self.image_shape
        rows, columns, entries = [values.ravel()], [values.ravel()], [np.ones(self.dimensions)]
        for number, (down, right) in enumerate(self.offsets):
            window = (slice(None), slice(0, height - down), slice(max(0, -right), width - max(0, right)))
            there = (slice(None), slice(down, height), slice(max(0, right), width + min(0, right)))
            rows.append(values[window].ravel())
            columns.append(values[there].ravel())
            entries.append(neighbours[:, number][window].ravel())
        for number, (early, late) in enumerate(self.pairs):
            rows.append(values[early].ravel())
            columns.append(values[late].ravel())
            entries.append(between[number].ravel())
        places = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_array((np.concatenate(entries), places), shape=(self.dimensions, self.dimensions))

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and log sigma [B, C, H, W], neighbours [B, C, N, H, W], between channels [B, pairs, H, W]."""
        channels, count = self.image_shape[0], len(self.offsets)
        sizes = [channels, channels, channels * count, len(self.pairs)]
        mean, raw, neighbours, between = torch.split(wide(params), sizes, dim=1)
        log_sigma = floored(math.log(self.config.initial_sigma) + raw, self.config.sigma_floor)
        return (
            decoded_mean(mean, self.config),
            log_sigma,
            rearrange(neighbours, "b (c n) h w -> b c n h w", n=count),
            between,
        )


def offsets_after(radius: int) -> list[tuple[int, int]]:
    """(down, right) of the neighbours that come after a pixel in raster order."""
    same_row = [(0, right) for right in range(1, radius + 1)]
    below = [(down, right) for down in range(1, radius + 1) for right in range(-radius, radius + 1)]
    return same_row + below
