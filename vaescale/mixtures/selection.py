"""Choice of the number of components: fits compared by held-out density and by BIC. Schwarz 1978.

BIC = -2 N mean log density + parameters ln N            N: number of images, whatever the number of draws
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import UserError
from vaescale.mixtures import em
from vaescale.mixtures.gaussian import Kind, Mixture, log_density, on
from vaescale.mixtures.starts import Start, start
from vaescale.mixtures.steps import Latents

Criterion = Literal["held-out", "bic"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
MOST_FIT_BYTES = 1 << 32  # of each process
COLLAPSED_VARIANCE = 0.01  # as for active units: Burda, Grosse & Salakhutdinov 2016


class Set(Latents, Protocol):
    """Latents to fit, with access by number on every rank."""

    def rows(self, wanted: Tensor) -> Tensor:
        """The latents with these numbers (int64 [M], ascending), on every rank: float64 [M, Z]."""
        ...


class Spread(NamedTuple):
    """The variance of the aggregate posterior between the images' means and within q(z|x), float64 [Z] each."""

    between: Tensor
    within: Tensor
    error: float = 0.0  # standard error of `between` for a latent with the same q(z|x) for all images, relative to the total

    @property
    def total(self) -> Tensor:
        """The variance of the aggregate posterior."""
        return self.between + self.within

    @property
    def collapsed(self) -> Tensor:
        """Return for each latent whether its mean hardly varies between images, bool [Z].

        The limit is a share of the total variance, or the sampling error of draws where this is larger.
        """
        return self.between < (COLLAPSED_VARIANCE + 3 * self.error) * self.total


class Candidate(NamedTuple):
    """A fitted mixture and its scores: mean log densities in nats on the fitted and on held-out latents, and BIC."""

    mixture: Mixture
    iterations: int
    converged: bool
    reseeded: int
    train_nats: float
    val_nats: float
    bic: float

    def summary(self) -> dict[str, float | int | bool]:
        """The scores for tables and JSON."""
        return {
            "components": len(self.mixture.weights),
            **{name: value for name, value in self._asdict().items() if name != "mixture"},
        }


def candidate(
    latents: Set,
    drawn: Latents,
    val: Latents,
    num_components: int,
    *,
    fit: Callable[[Mixture], em.Fit],
    restarts: int,
    images: int,
    kind: Kind,
    how: Start,
    seed: int,
    ridge: float | Tensor,
) -> Candidate:
    """The best of `restarts` fits from different starts, by the density of the training draws.

    latents: the latents to fit. drawn, val: draws of the training and held-out images, for the densities. images: number of
    training images.
    """
    fits = []
    for number in range(restarts):
        first = start(latents, num_components, kind=kind, how=how, seed=seed + number, ridge=ridge)
        fits.append(fit(first))
    densities = [mean_log_density(fit.mixture, drawn) for fit in fits]
    train_nats = max(densities)
    best = fits[densities.index(train_nats)]
    val_nats = mean_log_density(best.mixture, val)
    bic = -2 * images * train_nats + best.mixture.num_parameters * math.log(images)
    return Candidate(
        best.mixture, len(best.history), best.converged, best.reseeded, train_nats, val_nats, bic
    )


def choose(candidates: list[Candidate], criterion: Criterion) -> Candidate:
    """The candidate with the highest held-out density, or the lowest BIC."""
    if criterion == "bic":
        return min(candidates, key=lambda candidate: candidate.bic)
    return max(candidates, key=lambda candidate: candidate.val_nats)


def mean_log_density(mixture: Mixture, latents: Latents, rows: int = 1 << 14) -> float:
    """The mean log density of draws over all ranks, in nats, computed in float64."""
    total = torch.zeros(1, dtype=torch.float64)
    for z, variance in latents.parts():
        assert variance is None, "expected draws, got moments"
        for batch in torch.split(z, rows):
            total += log_density(on(mixture, batch.device), batch.double()).sum().cpu()
    return float(comm.all_reduce_sum(total)) / latents.count


def spread_of(latents: Latents, draws: int = 0) -> Spread:
    """The spread of latents over all ranks: means and variances of q(z|x), or `draws` (at least 2) per image in a row.

    For draws by the analysis of variance: the variance of the means of S draws is that between images plus 1/S of that within.
    """
    total = torch.zeros(3, latents.size, dtype=torch.float64)
    for z, variance in latents.parts():
        wide = z.double().cpu()
        if variance is None:
            by_image = wide.view(-1, draws, latents.size)
            wide, within = by_image.mean(1), by_image.var(1)
        else:
            within = variance.double().cpu()
        total += torch.stack([wide.sum(0), wide.square().sum(0), within.sum(0)])
    images = latents.count // max(1, draws)
    mean, square, within = comm.all_reduce_sum(total.flatten()).view(3, -1) / images
    between = square - mean.square()
    if not draws:
        return Spread(between.clamp_min(0.0), within)
    error = math.sqrt(2 / images) / draws * math.sqrt(draws / (draws - 1))
    return Spread((between - within / draws).clamp_min(0.0), within, error)


def fit_bytes(num_components: int, latents: int, kind: Kind) -> int:
    """The memory of a fit that grows with the covariances, in bytes.

    Eight copies of the components' covariances and ten of the pooled one in float64; and as many bytes as eight float32 copies of
    the coefficients of all products z_i z_j, whose number of components is rounded up to 16. Within 15% of the peak measured for
    1, 10 and 40 full covariances of 512 and 1024 latents, without the features that are kept between iterations.
    """
    square, padded = latents**2 * 8, -(-num_components // 16) * 16
    matrices = num_components * square * 8 + padded * square // 2 * 4 if kind == "full" else 0
    return matrices + 10 * square


def refuse_unfit(
    spread: Spread,
    num_components: int,
    images: int,
    kind: Kind = "full",
    of: str = "",
    *,
    draws: int | None = None,
) -> None:
    """Raise UserError for fewer images than components, covariances that exceed the memory, and a collapsed posterior.

    The posterior has collapsed when no latent's mean varies between images; a fit would return that one Gaussian. of: the part
    of the message that names the latents. draws: number of draws to fit, over all images; None for moments. No more draws than
    latents leave a full covariance without an inverse.
    """
    size = len(spread.within)
    needed = fit_bytes(num_components, size, kind)
    if needed > MOST_FIT_BYTES:
        components = f"{num_components} component{'s' if num_components > 1 else ''}"
        smaller = (
            "--groups with fewer latents"
            if kind != "full"
            else "--covariance diag or tied, or fewer components"
        )
        raise UserError(
            f"a fit of {components} with {kind} covariances of {size} latents takes {needed / 2**30:.1f} GiB, and at most "
            f"{MOST_FIT_BYTES / 2**30:.0f} GiB are allowed; take {smaller}"
        )
    if kind in ("full", "tied") and draws is not None and draws <= size:
        raise UserError(
            f"{draws} draws of {size} latents determine no {kind} covariance, which takes at least {size + 1} draws for each of its "
            f"components; take --covariance diag, more --samples-per-image, or its moments (--samples-per-image 0)"
        )
    if images < num_components:
        raise UserError(f"{images} images cannot feed {num_components} components; lower --components")
    if (spread.total <= 1e-12).all():
        raise UserError(
            "all latents are constant, so a mixture cannot be fitted; lower objective.beta or train longer"
        )
    if spread.collapsed.all():
        raise UserError(
            f"the posterior{of} has collapsed: q(z|x) is the same for every image, so a mixture adds nothing to it; "
            + (
                "take more groups with --groups, or train longer"
                if of
                else "lower objective.beta, or take likelihood.sigma=optimal"
            )
        )
