"""A fitted mixture beside the model's prior, the same components with simpler covariances, and the images of each component."""

from typing import NamedTuple

from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Kind, Mixture
from vaescale.mixtures.selection import mean_log_density
from vaescale.mixtures.simpler import simpler
from vaescale.mixtures.steps import Latents

NOTED_NATS = 0.1  # a simpler form that is better by less is no reason to fit again


class HeldOut(NamedTuple):
    """Mean log densities of held-out latents in nats, and the images on which each covariance rests.

    nats, prior_nats, simpler_nats: of the mixture, of the model's prior, and of the mixture's components with each simpler form of
    covariances. covariances, latents: their numbers. fewest: the smallest number of images of a covariance: a component's weight
    times the images, or all images for a tied one. short: number of full or tied covariances with no more images than latents. The
    spread of so few does not fill the covariance, so that it rests on the width of q(z|x) and on the ridge.
    """

    kind: Kind
    nats: float
    prior_nats: float
    simpler_nats: dict[Kind, float]
    covariances: int
    latents: int
    fewest: float
    short: int

    def notes(self) -> list[str]:
        """What a user must know before sampling from the mixture, as sentences."""
        notes = [self._short_note()] if self.short else []
        better = {kind: nats for kind, nats in self.simpler_nats.items() if nats > self.nats + NOTED_NATS}
        if better:
            kind = max(better, key=lambda name: better[name])
            notes.append(
                f"held-out latents have {self.nats:.3f} nats under the {self.kind} mixture, and {better[kind]:.3f} under the same "
                f"components with {kind} covariances; take --covariance {kind}, or more --samples-per-image"
            )
        if not self.nats >= self.prior_nats:
            notes.append(
                f"held-out latents have {self.nats:.3f} nats under the mixture, fewer than the {self.prior_nats:.3f} under the "
                f"model's prior; take fewer --components, or sample from the prior"
            )
        return notes

    def refuse_singular(self) -> None:
        """Raise UserError for a mixture that is worse than the prior because its covariances are short of images."""
        if self.short and not self.nats >= self.prior_nats:
            raise UserError(
                f"{self._short_note()}: held-out latents have {self.nats:.0f} nats under the mixture and {self.prior_nats:.0f} under "
                f"the model's prior; nothing is saved, take fewer --components or --covariance diag"
            )

    def _short_note(self) -> str:
        return (
            f"{self.short} of {self.covariances} covariances rest on no more images than latents (the fewest: {self.fewest:.1f} images "
            f"for {self.latents} latents)"
        )


def held_out(mixture: Mixture, val: Latents, *, nats: float, prior_nats: float, images: int) -> HeldOut:
    """Compare a mixture on held-out draws. All ranks call it.

    nats, prior_nats: mean log density of `val` under the mixture and under the prior. images: number of fitted images.
    """
    size = mixture.means.shape[1]
    each = [float(images)] if mixture.kind == "tied" else (mixture.weights * images).tolist()
    return HeldOut(
        kind=mixture.kind,
        nats=nats,
        prior_nats=prior_nats,
        simpler_nats={form.kind: mean_log_density(form, val) for form in simpler(mixture)},
        covariances=len(each),
        latents=size,
        fewest=min(each),
        short=sum(number <= size for number in each) if mixture.kind in ("full", "tied") else 0,
    )
