"""Recipe sections of the objectives, and the dict that names them. Imports no torch.

To add an objective: a class (see `base.py`), its section, which names the class, and a line in OBJECTIVES.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vaescale.config import (
    GAUSSIAN,
    GROUPS,
    LATENT_MAP,
    ONE_VECTOR,
    SIGMA_OF_ANY_SIZE,
    SIGMA_OF_DRAWS,
    UNCOMPILED,
    Config,
    Need,
    Sizes,
)
from vaescale.models.config import EquivarianceConfig
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

    @property
    def reads_spectrum(self) -> bool:
        """True with a weight for the spectral term."""
        return self.spectral > 0

    @property
    def transforms(self) -> EquivarianceConfig | None:
        """Those of the equivariance term, if it has a weight."""
        return self.equivariance if self.equivariance and self.equivariance.weight > 0 else None

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

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse an MMD over a single image."""
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


class IwaeConfig(ObjectiveConfig):
    """The importance-weighted bound, -log 1/K sum of K importance weights."""

    implementation = "vaescale.objectives.iwae.Iwae"
    kind: Literal["iwae"] = "iwae"
    samples: int = Field(gt=0, description="K, the number of draws of z for each image")
    gradient: Literal["reparameterized", "doubly_reparameterized"] = Field(
        default="reparameterized",
        description="gradient of the encoder; `doubly_reparameterized` has less noise for many samples",
    )

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


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {"elbo": ElboConfig, "iwae": IwaeConfig}
