"""Recipe sections of the objectives, and the dict that names them. Imports no torch.

To add an objective: a class (see `base.py`), its section, which names the class, and a line in OBJECTIVES.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vaescale.adversaries.config import (
    AdversarialConfig,
    BothPlayersConfig,
    ImagePlayerConfig,
    LatentPlayerConfig,
    PairPlayerConfig,
    PlayerConfig,
)
from vaescale.config import (
    CONDITIONED_LOSS,
    DECODED_MEAN,
    FIXED_POSTERIOR,
    GAUSSIAN,
    GROUPS,
    LATENT_MAP,
    LEARNED_PRIOR,
    MEAN_ALONE,
    ONE_VECTOR,
    SIGMA_OF_ANY_SIZE,
    SIGMA_OF_DRAWS,
    UNCOMPILED,
    UNSCALED_LOSS,
    Config,
    Need,
    Property,
    Sizes,
)
from vaescale.models.config import EquivarianceConfig, Shows
from vaescale.perceptual.config import PerceptualConfig
from vaescale.schedules import Annealing


class ObjectiveConfig(Config):
    """The section of a loss. Its implementation is a `base.Objective`, built with the model."""

    kind: str

    @property
    def reads_spectrum(self) -> bool:
        """Whether the loss needs the layers' singular values, which the model computes only then."""
        return False

    @property
    def transforms(self) -> EquivarianceConfig | None:
        """The transformations whose likelihood the loss needs, which the model computes only then."""
        return None

    @property
    def shows(self) -> Shows | None:
        """What the model shows a second player, if the loss has one."""
        return None

    @property
    def has_bound(self) -> bool:
        """Whether the loss trains p(x|z), so that evaluation may report bounds on log p(x)."""
        return True


class FreeBitsConfig(Config):
    """Free bits: a number of nats whose cost does not depend on whether latents use it."""

    nats: float = Field(gt=0, description="number of free nats for each latent (channel of a map) or group")
    per: Literal["latent", "group"] = Field(default="latent", description="unit to which the free nats apply")


class CapacityConfig(Config):
    """A penalty on the distance of the KL from a capacity, which rises from 0."""

    nats: float = Field(gt=0, description="final capacity")
    steps: int = Field(gt=0, description="steps over which the capacity rises linearly")
    weight: float = Field(default=1000.0, gt=0, description="gamma, the weight of |KL - capacity|")


class MmdConfig(Config):
    """A loss term: the maximum mean discrepancy between aggregate posterior and prior."""

    weight: float = Field(gt=0, description="lambda, the weight of the term")
    kernel: Literal["imq", "rbf"] = Field(
        default="imq", description="kernel: inverse multiquadratic, C / (C + d^2), or Gaussian, exp(-d^2 / C)"
    )


class DipConfig(Config):
    """A loss term: the distance of the aggregate posterior's covariance from the identity."""

    variant: Literal["i", "ii"] = Field(
        description="covariance: i of the posterior means, ii of the posterior means plus the mean posterior variance"
    )
    off_diagonal: float = Field(default=10.0, ge=0, description="lambda_od, the weight of the covariances")
    diagonal: float | None = Field(
        default=None,
        ge=0,
        description="lambda_d, the weight of the variances; null: as in the paper, 10 lambda_od for I, lambda_od for II",
    )


class ElboConfig(ObjectiveConfig):
    """-log p(x|z) + beta KL, with changes to the KL and terms added to it."""

    implementation = "vaescale.objectives.elbo.Elbo"
    kind: Literal["elbo"] = "elbo"
    beta: Annotated[float, Field(ge=0)] | Annealing = Field(
        default=1.0,
        description="weight of the KL: a number, or a schedule such as {schedule: linear, steps: 1000}; also cosine, "
        "sigmoid, cyclical",
    )
    free_bits: FreeBitsConfig | None = Field(default=None, description="amount of KL without a cost")
    capacity: CapacityConfig | None = Field(
        default=None, description="penalize the distance of the KL from a rising capacity, instead of beta"
    )
    balancing: Literal["never", "while_annealing", "always"] = Field(
        default="never",
        description="when to weight a ladder's groups by their KL; NVAE does so while beta rises",
    )
    mmd: MmdConfig | None = Field(default=None, description="add the MMD of aggregate posterior and prior")
    dip: DipConfig | None = Field(default=None, description="add the DIP-VAE covariance penalty")
    spectral: float = Field(
        default=0.0, ge=0, description="weight of the sum of the layers' largest singular values"
    )
    equivariance: EquivarianceConfig | None = Field(
        default=None, description="add -log p(Tx|Tz) of transformed images and latent maps (EQ-VAE)"
    )

    adversarial: AdversarialConfig | None = Field(
        default=None,
        description="add a discriminator's judgement of the decoded means (VQGAN, latent diffusion)",
    )
    perceptual: PerceptualConfig | None = Field(
        default=None,
        description="add the distance of the decoded mean from the image in a frozen network's maps (LPIPS)",
    )

    @property
    def shows(self) -> Shows | None:
        """The reconstructions, for the adversarial and the perceptual term."""
        return Shows() if self.adversarial or self.perceives else None

    @property
    def perceives(self) -> PerceptualConfig | None:
        """The perceptual term, if it has a weight."""
        return self.perceptual if self.perceptual and self.perceptual.weight > 0 else None

    @property
    def reads_spectrum(self) -> bool:
        """True with a weight for the spectral term."""
        return self.spectral > 0

    @property
    def transforms(self) -> EquivarianceConfig | None:
        """Those of the equivariance term, if it has a weight."""
        return self.equivariance if self.equivariance and self.equivariance.weight > 0 else None

    def offers(self) -> frozenset[Property]:
        """The properties of conditions, without terms that count all layers or call the networks again, and of learned priors,
        without those that compare q(z) with N(0, I).
        """
        passes_it_on = not (self.reads_spectrum or self.transforms)
        offered = {CONDITIONED_LOSS} if passes_it_on else set()
        return frozenset(offered if self.mmd or self.dip else {*offered, LEARNED_PRIOR})

    def needs(self) -> Iterable[Need]:
        """The needs of batch terms (one vector per image) and of balancing (groups)."""
        for term in ("mmd", "dip"):
            if getattr(self, term):
                yield Need(f"objective.{term}", ONE_VECTOR, "leave it out")
        if self.balancing != "never":
            yield Need(f"objective.balancing (={self.balancing!r})", GROUPS, "leave it out")
        if self.transforms:
            key = "objective.equivariance"
            yield Need(key, LATENT_MAP, "leave it out, or choose network.kind resnet")
            yield Need(key, SIGMA_OF_ANY_SIZE, "choose gaussian or laplace with one sigma for all pixels")
            yield Need(key, UNCOMPILED, "set training.compile to false")
        of_a_density = ("free_bits", "capacity", "mmd", "dip", "equivariance")
        for term in (*of_a_density, *(["beta"] if self.beta != 1.0 else [])):
            if getattr(self, term):  # the KL of codes is a constant
                yield Need(f"objective.{term}", GAUSSIAN, "leave it out")
        if self.adversarial:
            yield from needs_of_players("objective.adversarial")
        if self.perceives:
            yield from self.perceives.needs_for("objective.perceptual")

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse an MMD over a single image, and a second player that never plays."""
        if self.adversarial:
            self.adversarial.check_start("objective.adversarial", sizes)
        if self.perceives:
            self.perceives.check_start("objective.perceptual", sizes)
        if self.mmd and sizes.micro_batch < 2:
            raise ValueError(
                f"objective.mmd compares images, and a micro-batch has {sizes.micro_batch}; raise data.global_batch "
                f"(={sizes.global_batch}) or lower training.accumulation"
            )

    @model_validator(mode="after")
    def _one_rule_for_the_kl(self) -> "ElboConfig":
        given = [name for name in ("free_bits", "capacity") if getattr(self, name)]
        given += ["balancing"] if self.balancing != "never" else []
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} and objective.{given[1]} both set the cost of the KL; give one of them"
            )
        if self.capacity and self.beta != 1.0:
            raise ValueError("capacity replaces beta; leave objective.beta out, or set capacity.weight")
        if self.balancing == "while_annealing" and not isinstance(self.beta, Annealing):
            raise ValueError("balancing is while_annealing, but beta does not change; give beta a schedule")
        return self


def needs_of_players(key: str) -> Iterable[Need]:
    """The needs of a loss with a second player. key: the section's."""
    yield Need(key, UNCOMPILED, "set training.compile to false")
    yield Need(key, UNSCALED_LOSS, "set training.precision to bf16 or fp32")
    yield Need(key, DECODED_MEAN, "choose another likelihood.kind")


class IwaeConfig(ObjectiveConfig):
    """The importance-weighted bound, -log 1/K sum of K importance weights."""

    implementation = "vaescale.objectives.iwae.Iwae"
    kind: Literal["iwae"] = "iwae"
    samples: int = Field(gt=0, description="K, the number of draws of z for each image")
    gradient: Literal["reparameterized", "doubly_reparameterized"] = Field(
        default="reparameterized",
        description="gradient of the encoder; `doubly_reparameterized` has less noise for many samples",
    )

    def offers(self) -> frozenset[Property]:
        """The properties of conditions, and of learned priors."""
        return frozenset({CONDITIONED_LOSS, LEARNED_PRIOR})

    def needs(self) -> Iterable[Need]:
        """The needs of weighted draws, and of the second gradient: a hook on a single z."""
        yield Need("objective.kind (='iwae')", GAUSSIAN, "choose elbo")
        yield Need(
            "objective.kind (='iwae')",
            SIGMA_OF_DRAWS,
            "set likelihood.sigma to shared, a number, or predicted without a handover",
        )
        if self.gradient == "doubly_reparameterized":
            yield Need("objective.gradient (='doubly_reparameterized')", ONE_VECTOR, "choose reparameterized")


class GameConfig(ObjectiveConfig):
    """What the objectives that are games of two players share: a section `discriminator`, and no likelihood of images."""

    discriminator: PlayerConfig

    @property
    def has_bound(self) -> bool:
        """False: p(x|z) is no part of the loss."""
        return False

    def needs(self) -> Iterable[Need]:
        """The needs of a second player, of latents that it can see, and of a decoder that is trained as a whole."""
        key = f"objective.kind (={self.kind!r})"
        yield from needs_of_players(key)
        yield Need(key, ONE_VECTOR, "choose network.kind conv or resnet")
        yield Need(key, GAUSSIAN, "choose posterior.kind diagonal or fixed")
        if not self.has_bound:
            yield Need(key, MEAN_ALONE, "choose gaussian or laplace, with sigma optimal or a number")

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a game that begins late: without it nothing is trained."""
        if self.discriminator.start_step and not self.has_bound:
            raise ValueError(
                f"objective.discriminator.start_step (={self.discriminator.start_step}) must be 0: before it, "
                f"objective.kind {self.kind!r} has nothing to minimize"
            )
        self.discriminator.check_start("objective.discriminator", sizes)


class AaeConfig(GameConfig):
    """The adversarial autoencoder: -log p(x|z), and a discriminator of latents in place of the KL."""

    implementation = "vaescale.objectives.aae.Aae"
    kind: Literal["aae"] = "aae"
    weight: float = Field(default=1.0, gt=0, description="weight of the latents' adversarial term")
    discriminator: LatentPlayerConfig = Field(
        default=LatentPlayerConfig(), description="the discriminator of latents"
    )

    @property
    def has_bound(self) -> bool:
        """True: the loss has -log p(x|z), although no KL."""
        return True

    @property
    def shows(self) -> Shows:
        """Draws of the prior."""
        return Shows(prior=True)


class VaeGanConfig(GameConfig):
    """VAE-GAN: KL, reconstruction errors in the discriminator's features, and adversarial images."""

    implementation = "vaescale.objectives.vae_gan.VaeGan"
    kind: Literal["vae_gan"] = "vae_gan"
    gamma: float = Field(default=1.0, gt=0, description="weight of the feature errors in the decoder's loss")
    discriminator: ImagePlayerConfig = Field(
        default=ImagePlayerConfig(), description="the discriminator of images; its last maps are the features"
    )

    @property
    def shows(self) -> Shows:
        """Draws of the prior, decoded, and reconstructions without a gradient for the encoder."""
        return Shows(prior=True, generated=True, held=True)


class AlphaGanConfig(GameConfig):
    """alpha-GAN: absolute errors, a discriminator of latents and one of images."""

    implementation = "vaescale.objectives.alpha_gan.AlphaGan"
    kind: Literal["alpha_gan"] = "alpha_gan"
    reconstruction: float = Field(
        default=10.0, gt=0, description="lambda, the weight of the mean absolute error of an image's values"
    )
    prior_samples: bool = Field(
        default=True, description="whether the discriminator of images sees decoded draws of the prior, too"
    )
    discriminator: BothPlayersConfig = Field(
        default=BothPlayersConfig(), description="the discriminators of images and of latents"
    )

    @property
    def shows(self) -> Shows:
        """Draws of the prior, decoded if the discriminator of images sees them."""
        return Shows(prior=True, generated=self.prior_samples)


class VeeganConfig(GameConfig):
    """VEEGAN: a discriminator of pairs of latents and images, and latents recovered from decoded draws of the prior."""

    implementation = "vaescale.objectives.veegan.Veegan"
    kind: Literal["veegan"] = "veegan"
    discriminator: PairPlayerConfig = Field(
        default=PairPlayerConfig(), description="the discriminator of pairs"
    )

    @property
    def shows(self) -> Shows:
        """Draws of the prior, decoded and encoded again."""
        return Shows(prior=True, generated=True, recovered=True)

    def needs(self) -> Iterable[Need]:
        """The need of constant standard deviations of q(z|x), too: the loss has no gradient for them."""
        yield from super().needs()
        yield Need("objective.kind (='veegan')", FIXED_POSTERIOR, "choose posterior.kind fixed")


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "elbo": ElboConfig,
    "iwae": IwaeConfig,
    "aae": AaeConfig,
    "vae_gan": VaeGanConfig,
    "alpha_gan": AlphaGanConfig,
    "veegan": VeeganConfig,
}
