"""How many components: fits of several numbers, compared on held-out latents and by BIC. Schwarz 1978.

BIC = -2 N mean log density + parameters ln N            N: images, of which each counts once however often it is drawn
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
MOST_COVARIANCE_BYTES = 1 << 31
COLLAPSED_VARIANCE = 0.01  # as for active units: Burda, Grosse & Salakhutdinov 2016


class Set(Latents, Protocol):
    """Latents to fit to, of which some can be had on every rank."""

    def rows(self, wanted: Tensor) -> Tensor:
        """Float64 [M, Z] of the numbers int64 [M], ascending."""
        ...


class Spread(NamedTuple):
    """Where the variance of the aggregate posterior comes from, [Z] float64: between the images' means, and within q(z|x)."""

    between: Tensor
    within: Tensor
    error: float = (
        0.0  # the standard error of `between` of a latent that all images have alike, as a part of the total
    )

    @property
    def total(self) -> Tensor:
        """The aggregate's own variance."""
        return self.between + self.within

    @property
    def collapsed(self) -> Tensor:
        """Whether a latent's mean hardly moves, in its own scale: of a used latent the aggregate is about as wide as the prior.
        Nor is one used that moves by no more than what draws by chance give.
        """
        return self.between < (COLLAPSED_VARIANCE + 3 * self.error) * self.total


class Candidate(NamedTuple):
    """A fit, and what it is worth: nats a latent, on the latents that were fitted and on held-out ones."""

    mixture: Mixture
    iterations: int
    converged: bool
    reseeded: int
    train_nats: float
    val_nats: float
    bic: float

    def words(self) -> dict[str, float | int | bool]:
        """For tables and JSON."""
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
    """The best of `restarts` fits from different starts, by the density of the draws.

    latents: what is fitted; drawn, val: draws of the training and the held-out images, of which densities are taken.
    images: how many the former are.
    """
    fits = []
    for number in range(restarts):
        first = start(latents, num_components, kind=kind, how=how, seed=seed + number, ridge=ridge)
        fits.append(fit(first))
    densities = [mean_log_density(one.mixture, drawn) for one in fits]
    train_nats = max(densities)
    best = fits[densities.index(train_nats)]
    val_nats = mean_log_density(best.mixture, val)
    bic = -2 * images * train_nats + best.mixture.num_parameters * math.log(images)
    return Candidate(
        best.mixture, len(best.history), best.converged, best.reseeded, train_nats, val_nats, bic
    )


def choose(candidates: list[Candidate], criterion: Criterion) -> Candidate:
    """The one with the greatest held-out density, or the least BIC."""
    if criterion == "bic":
        return min(candidates, key=lambda one: one.bic)
    return max(candidates, key=lambda one: one.val_nats)


def mean_log_density(mixture: Mixture, latents: Latents, rows: int = 1 << 14) -> float:
    """Over all ranks, in nats, float64. The latents are draws, not moments."""
    own = torch.zeros(1, dtype=torch.float64)
    for z, variance in latents.parts():
        assert variance is None, "a density is one of draws"
        for part in torch.split(z, rows):
            own += log_density(on(mixture, part.device), part.double()).sum().cpu()
    return float(comm.all_reduce_sum(own)) / latents.count


def spread_of(latents: Latents, draws: int = 0) -> Spread:
    """Over all ranks. latents: means and variances of q(z|x), or `draws` (at least 2) of each image, one after another.

    Of draws by the analysis of variance: the variance of the S draws' means is that between images, and 1/S of that within.
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


def refuse_unfit(spread: Spread, num_components: int, images: int, kind: Kind = "full", of: str = "") -> None:
    """Raise UserError when there are fewer images than components, when the covariances would not fit in memory, and when no
    latent's mean moves from image to image: the posterior is then the same for every one, and what would be fitted is that
    one Gaussian. of: words on which latents they are.
    """
    needed = num_components * len(spread.within) ** 2 * 8
    if kind == "full" and needed > MOST_COVARIANCE_BYTES:
        raise UserError(
            f"{num_components} full covariances of {len(spread.within)} latents take {needed / 2**30:.1f} GiB, and several "
            f"times that while they are fitted; take --covariance diag, or fewer components"
        )
    if images < num_components:
        raise UserError(f"{images} images cannot feed {num_components} components; lower --components")
    if (spread.total <= 1e-12).all():
        raise UserError(
            "the latents are constant and there is nothing to fit; lower objective.beta or train longer"
        )
    if spread.collapsed.all():
        raise UserError(
            f"the posterior{of} has collapsed: q(z|x) is the same for every image, and so is what would be fitted; "
            + (
                "take more groups with --groups, or train longer"
                if of
                else "lower objective.beta, or take likelihood.sigma=optimal"
            )
        )
