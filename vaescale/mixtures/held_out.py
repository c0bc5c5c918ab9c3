"""A fitted mixture beside the model's prior, the same components with simpler covariances, and the images of each component."""

from typing import NamedTuple

from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Kind, Mixture
from vaescale.mixtures.selection import mean_log_density
from vaescale.mixtures.simpler import simpler
from vaescale.mixtures.steps import Latents

NOTED_NATS = 0.1  # a simpler form that is better by less is no reason to fit again


class HeldOut(NamedTuple):
    """Mean log densities of held-out latents in nats, and the effective latents of each component: its weight times the images.

    nats, prior_nats, simpler_nats: of the mixture, of the model's prior, and of the mixture's components with each simpler form of
    covariances. components, latents: their numbers. fewest: effective latents of the component with the fewest. short: number of
    components of a full mixture with no more effective latents than latents: the spread of so few images does not fill the
    covariance, so that it rests on the width of q(z|x) and on the ridge.
    """

    kind: Kind
    nats: float
    prior_nats: float
    simpler_nats: dict[Kind, float]
    components: int
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
        """Raise UserError for a mixture that is worse than the prior because its components are short of images."""
        if self.short and not self.nats >= self.prior_nats:
            raise UserError(
                f"{self._short_note()}: held-out latents have {self.nats:.0f} nats under the mixture and {self.prior_nats:.0f} under "
                f"the model's prior; nothing is saved, take fewer --components or --covariance diag"
            )

    def _short_note(self) -> str:
        return (
            f"{self.short} of {self.components} components have no more images than latents (the fewest: {self.fewest:.1f} images for "
            f"{self.latents} latents), too few for a full covariance"
        )


def held_out(mixture: Mixture, val: Latents, *, nats: float, prior_nats: float, images: int) -> HeldOut:
    """Compare a mixture on held-out draws. All ranks call it.

    nats, prior_nats: mean log density of `val` under the mixture and under the prior. images: number of fitted images.
    """
    components, size = mixture.means.shape
    each = (mixture.weights * images).tolist()
    return HeldOut(
        kind=mixture.kind,
        nats=nats,
        prior_nats=prior_nats,
        simpler_nats={form.kind: mean_log_density(form, val) for form in simpler(mixture)},
        components=components,
        latents=size,
        fewest=min(each),
        short=sum(number <= size for number in each) if mixture.kind == "full" else 0,
    )
