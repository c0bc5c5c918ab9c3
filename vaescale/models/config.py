"""Recipe sections of the approximate posterior q(z|x), and the dict that names them. Imports no torch.

To add a posterior: a class (see `posterior.py`), its section, which names the class, and a line in POSTERIORS.
"""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from vaescale.config import (
    FIXED_POSTERIOR,
    GAUSSIAN,
    GROUPS,
    LATENT_MAP,
    ONE_VECTOR,
    UNCOMPILED,
    Config,
    Need,
    Property,
    Sizes,
)
from vaescale.errors import UserError

Sigma = Annotated[float, Field(gt=0, le=1000)]


class PosteriorConfig(Config):
    """The section of one q(z|x). Its implementation is a `posterior.Posterior`, or a `quantizer.Quantizer` where `quantized`, built
    with the number of latents.
    """

    quantized: ClassVar[bool] = False
    """Whether z is one of a finite number of codes at each place of a map, in place of a Gaussian draw."""

    kind: str

    def offers(self) -> frozenset[Property]:
        """The property that other sections may need: a Gaussian."""
        return frozenset() if self.quantized else frozenset({GAUSSIAN})

    def num_params(self, latents: int) -> int:
        """The number of channels that the encoder returns for this number of latents (channels of a map)."""
        raise NotImplementedError


class DiagonalConfig(PosteriorConfig):
    """A mean and a standard deviation for each latent."""

    implementation = "vaescale.models.posterior.Diagonal"
    kind: Literal["diagonal"] = "diagonal"
    bounded: bool = Field(
        default=True,
        description="bound log sigma smoothly to +-8, that of a ladder's priors too; false: no bound, which float32 may overflow",
    )

    def num_params(self, latents: int) -> int:
        """Channels for the means and log standard deviations."""
        return 2 * latents


class IsotropicConfig(PosteriorConfig):
    """A mean for each latent, and one standard deviation for all of them (at each place of a map)."""

    implementation = "vaescale.models.posterior.Isotropic"
    kind: Literal["isotropic"] = "isotropic"

    def num_params(self, latents: int) -> int:
        """Channels for the means and one log standard deviation."""
        return latents + 1

    def needs(self) -> Iterable[Need]:
        """The need of a single vector or map of latents."""
        yield Need("posterior.kind (='isotropic')", ONE_VECTOR, "choose diagonal or relative")


class Decreasing(Config):
    """Standard deviations in a geometric series from the first channel to the last."""

    first: Sigma = Field(description="standard deviation of the first channel")
    last: Sigma = Field(description="standard deviation of the last channel")


class FixedConfig(PosteriorConfig):
    """A mean for each latent, and constant standard deviations: the CV-VAE of Ghosh et al. 2020."""

    implementation = "vaescale.models.posterior.Fixed"
    kind: Literal["fixed"] = "fixed"
    sigma: Sigma | tuple[Sigma, ...] | Decreasing = Field(
        default=1.0,
        description="one number for all channels, a list with one for each, or {first: 1, last: 0.01} for a geometric "
        "series over the channels",
    )

    @model_validator(mode="after")
    def _a_list_is_not_empty(self) -> "FixedConfig":
        if self.sigma == ():
            raise ValueError("sigma (=[]) has no number; give one for each channel")
        return self

    def num_params(self, latents: int) -> int:
        """Channels for one mean of each latent."""
        return latents

    def offers(self) -> frozenset[Property]:
        """The property of objectives that train the means alone, and that of a Gaussian."""
        return super().offers() | {FIXED_POSTERIOR}

    def needs(self) -> Iterable[Need]:
        """The need of a single vector or map of latents."""
        yield Need("posterior.kind (='fixed')", ONE_VECTOR, "choose diagonal or relative")

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a list of sigma with another length than the number of latents."""
        self.sigmas(sizes.latent_dim)

    def sigmas(self, latents: int) -> list[float]:
        """One standard deviation for each channel. Raises ValueError when the list has another length."""
        if isinstance(self.sigma, Decreasing):
            steps = [channel / max(1, latents - 1) for channel in range(latents)]
            return [self.sigma.first * (self.sigma.last / self.sigma.first) ** step for step in steps]
        given = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,) * latents
        if len(given) != latents:
            raise ValueError(
                f"posterior.sigma has {len(given)} numbers for network.latent_dim (={latents}); give {latents}, or one for all"
            )
        return list(given)


class RelativeConfig(PosteriorConfig):
    """Mean and log sigma measured from the prior of a ladder's group. Vahdat & Kautz 2020, section 3.2.

    q = N(mu_p + dmu, (sigma_p dsigma)^2), so that raw parameters of zero give q = p.
    """

    implementation = "vaescale.models.posterior.Relative"
    kind: Literal["relative"] = "relative"

    def num_params(self, latents: int) -> int:
        """Channels for the means and log standard deviations."""
        return 2 * latents

    def needs(self) -> Iterable[Need]:
        """The need of groups, whose priors it is relative to."""
        yield Need("posterior.kind (='relative')", GROUPS, "choose diagonal")


class Codes(PosteriorConfig):
    """The base of codes: q(z|x) is one code at each place of a latent map, under a uniform prior over the codes."""

    quantized = True

    def num_params(self, latents: int) -> int:
        """Channels for the vector that is replaced by a code's."""
        return latents

    def needs(self) -> Iterable[Need]:
        """The needs of a map, and of a forward pass that keeps what the step's end reads."""
        key = f"posterior.kind (={self.kind!r})"
        remedy = "choose network.kind resnet, or conv with network.latent_map: true"
        yield Need(key, LATENT_MAP, remedy)
        yield Need(key, UNCOMPILED, "set training.compile to false")


class QuantizedConfig(Codes):
    """The nearest vector of a learned codebook at each place of a map: the VQ-VAE of van den Oord et al. 2017."""

    implementation = "vaescale.models.codebook.Codebook"
    kind: Literal["quantized"] = "quantized"
    codes: int = Field(default=512, ge=2, le=1 << 20, description="K, the number of vectors in the codebook")
    codebook: Literal["ema", "gradient"] = Field(
        default="ema",
        description="how the codebook follows the encoder: averages of the vectors that each code replaces, over the global batch "
        "and the last steps; or the gradient of their squared distance",
    )
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="decay of these averages and of the codes' use"
    )
    commitment: float = Field(
        default=0.25,
        ge=0,
        description="nats for each unit of squared distance of the encoder's vectors from their codes, summed over the places",
    )
    gradient: Literal["straight_through", "rotation"] = Field(
        default="straight_through",
        description="gradient of the encoder: that of the code's vector, or the same rotated and scaled from the code to the vector",
    )
    start_step: int = Field(
        default=1,
        ge=1,
        description="step after which k-means of its global batch starts the codebook; until then z is not quantized",
    )
    restart_every: int = Field(
        default=50, ge=1, description="steps between restarts of codes that are hardly used"
    )
    restart_below: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="use of a code, relative to the mean use, below which it restarts at a vector of the global batch; 0: never",
    )


Levels = Annotated[int, Field(ge=2, le=1 << 10)]


class FiniteScalarConfig(Codes):
    """Each channel of a map rounded to a few levels: the FSQ of Mentzer et al. 2024. Nothing is learned, and nothing added to the loss."""

    implementation = "vaescale.models.finite_scalar.FiniteScalar"
    kind: Literal["finite_scalar"] = "finite_scalar"
    levels: Annotated[tuple[Levels, ...], Field(min_length=1)] = Field(
        description="number of levels of each channel, such as [8, 5, 5, 5] for 1,000 codes"
    )

    @model_validator(mode="after")
    def _codes_can_be_counted(self) -> "FiniteScalarConfig":
        if (codes := math.prod(self.levels)) > 1 << 20:
            raise ValueError(
                f"levels (={list(self.levels)}) make {codes:,} codes; at most {1 << 20:,} are counted"
            )
        return self

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse another number of levels than of channels."""
        if len(self.levels) != sizes.latent_dim:
            raise ValueError(
                f"posterior.levels (={list(self.levels)}) has {len(self.levels)} numbers for network.latent_dim "
                f"(={sizes.latent_dim}); give one for each channel"
            )


Turns = Annotated[int, Field(ge=0, le=3)]
Scale = Annotated[float, Field(gt=0, le=1)]


class EquivarianceConfig(Config):
    """A loss term: -log p(Tx|Tz) of the transformed image given the transformed latent map, with T drawn for each step."""

    weight: float = Field(default=1.0, ge=0, description="weight of the term; 0: it is not computed")
    scales: tuple[Scale, Scale] | None = Field(
        default=(0.25, 1.0),
        description="range of the scale of T, [first, last), of which it takes those that give the map whole numbers of rows; "
        "null: no scaling",
    )
    turns: Annotated[tuple[Turns, ...], Field(min_length=1)] = Field(
        default=(1, 2, 3),
        description="numbers of quarter turns of T, one of which is drawn; [0]: no rotation",
    )
    anisotropic: bool = Field(
        default=False, description="draw a scale for the height and another for the width"
    )

    @model_validator(mode="after")
    def _a_transformation_changes_something(self) -> "EquivarianceConfig":
        if self.scales and self.scales[0] >= self.scales[1]:
            raise ValueError(f"scales (={list(self.scales)}) must be [first, last) with first below last")
        if self.scales is None and set(self.turns) == {0}:
            raise ValueError(
                "scales (=null) and turns (=[0]) leave images as they are; leave equivariance out"
            )
        if self.scales is None and self.anisotropic:
            raise ValueError("anisotropic (=True) has no meaning with scales: null; remove it")
        return self

    def sides(self, side: int, other: int) -> list[int]:
        """The numbers of rows that a map of side x other is scaled to, with whole numbers of columns unless these are drawn by themselves.

        Raises UserError when the range has none.
        """
        if self.scales is None:
            return [side]
        first, last = self.scales
        sides = [
            rows
            for rows in range(1, side + 1)
            if first <= rows / side < last and (self.anisotropic or rows * other % side == 0)
        ]
        if not sides:
            raise UserError(
                f"objective.equivariance.scales (={list(self.scales)}) gives a latent map of {side}x{other} no size; widen it, or set "
                "it to null"
            )
        return sides


class Shows(NamedTuple):
    """What a model shows discriminators besides images, reconstructions and latents (see `shown.py`)."""

    prior: bool = False
    held: bool = False
    generated: bool = False
    recovered: bool = False


POSTERIORS: dict[str, type[PosteriorConfig]] = {
    "diagonal": DiagonalConfig,
    "isotropic": IsotropicConfig,
    "fixed": FixedConfig,
    "relative": RelativeConfig,
    "quantized": QuantizedConfig,
    "finite_scalar": FiniteScalarConfig,
}
