"""Log density of the aggregate posterior q(z) = 1/N sum_n q(z|x_n), summed exactly over all images and ranks.

For a draw z of q(z|x_i), the sum holds the image's own term. The density of the other images alone is

    q_i(z) = 1/(N-1) sum_{n != i} q(z|x_n)

E[log q_i(z)] <= E[log q(z)] <= E[log 1/N sum_n q(z|x_n)] over data sets of N images        (Poole et al. 2019, eqs. 12 and 13)

Legend: z [M, Z], images [n, Z], all float64.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vaescale import comm
from vaescale.mixtures.points import Moments
from vaescale.system.console import Progress

VALUES = 1 << 21
CACHED_VALUES = 1 << 16
# Expanded squares lose about this times 2^-52 nats: farther images are compared by squares of differences.
EXPANDED = 1e8
QUIET_SECONDS = 1.0  # what ends within it shows no progress
LOG_2_PI = math.log(2 * math.pi)


def aggregate_log_density(moments: Moments, z: Tensor) -> Tensor:
    """log q(z) [M] in nats of z [M, Z] float64, over all ranks' images: log 1/N sum_n N(z; mean_n, variance_n)."""
    return _log_sum(moments, z) - math.log(moments.count)


def others_log_density(moments: Moments, z: Tensor, numbers: Tensor) -> Tensor:
    """log q_i(z) [M] in nats of z [M, Z] float64: draw m without the term of image numbers[m] (int64 [M], ascending)."""
    return _log_sum(moments, z, numbers) - math.log(moments.count - 1)


def marginal_log_densities(moments: Moments, z: Tensor) -> Tensor:
    """log q(z_j) [M, Z] in nats of z [M, Z] float64, latent by latent, over all ranks' images."""
    parts = []
    for mean, variance, _ in batches(moments, z.numel(), what="log q(z) by latent"):
        standard = (z[:, None] - mean) * variance.rsqrt()
        log_normal = -0.5 * (standard.square() + variance.log() + LOG_2_PI)
        parts.append(torch.logsumexp(log_normal, dim=1))
    return _over_ranks(parts, z) - math.log(moments.count)


def batches(
    moments: Moments, width: int, *, what: str = "latents"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's means, variances (float64) and numbers in batches whose products with `width` fit in memory.

    what: the name of the display of their progress, where it takes long.
    """
    rows, start, done, every = max(16, VALUES // max(1, width)), 0, 0, moments.numbers
    with Progress(
        what, len(every), unit="images", shown=comm.is_main(), quiet_seconds=QUIET_SECONDS
    ) as progress:
        for means, variances in moments.parts():
            assert variances is not None, "expected moments, got draws"
            numbers = every[start : start + len(means)]
            start += len(means)
            for mean, variance, number in zip(
                torch.split(means, rows),
                torch.split(variances, rows),
                torch.split(numbers, rows),
                strict=True,
            ):
                yield mean.double().cpu(), variance.double().cpu(), number
                done += len(number)
                progress.update(done)


def _log_sum(moments: Moments, z: Tensor, without: Tensor | None = None) -> Tensor:
    """log sum_n N(z; mean_n, variance_n) [M]; for draw m without image without[m], if given."""
    centre, parts = z.mean(0), []
    z = z - centre
    for mean, variance, numbers in batches(moments, len(z), what="log q(z)"):
        joint = _log_normal(z, mean - centre, variance)
        if without is not None:
            draw = torch.searchsorted(without, numbers).clamp_max(len(without) - 1)
            own = (without[draw] == numbers).nonzero()[:, 0]
            joint[draw[own], own] = -math.inf
        parts.append(torch.logsumexp(joint, dim=1))
    return _over_ranks(parts, z[:, 0])


def _log_normal(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(z_m; mean_n, variance_n) in nats, [M, n]."""
    precision = variance.reciprocal()
    constant = -0.5 * (variance.log() + LOG_2_PI).sum(1)
    largest = z.square().amax(0)
    near = ((mean.square() + largest) * precision).sum(1) < EXPANDED
    if near.all():
        return _expanded(z, mean, precision) + constant
    joint = z.new_empty(len(z), len(mean))
    joint[:, near] = _expanded(z, mean[near], precision[near])
    joint[:, ~near] = _differences(z, mean[~near], precision[~near])
    return joint + constant


def _expanded(z: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """-1/2 sum_j (z_j - m_j)^2 / v_j = z^2 . (-1/2v) + z . (m/v) - sum m^2 / 2v: two matrix products."""
    constant = -0.5 * (mean.square() * precision).sum(1)
    return z.square() @ (-0.5 * precision).T + z @ (mean * precision).T + constant


def _differences(z: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """The same, latent by latent: slower, without cancellation."""
    columns, rows = [], max(1, CACHED_VALUES // len(z))
    for some, roots in zip(torch.split(mean, rows), torch.split(precision.sqrt(), rows), strict=True):
        total = z.new_zeros(len(z), len(some))
        for latent in range(z.shape[1]):
            standard = (z[:, latent, None] - some[:, latent]).mul_(roots[:, latent])
            total.addcmul_(standard, standard, value=-0.5)
        columns.append(total)
    return torch.cat(columns, dim=1)


def _over_ranks(parts: list[Tensor], like: Tensor) -> Tensor:
    """Log-sum-exp over the batches of all ranks."""
    nothing = torch.full_like(like, -math.inf)
    local = torch.logsumexp(torch.stack([nothing, *parts]), dim=0)
    return torch.logsumexp(torch.stack(comm.gather_object(local)), dim=0)
