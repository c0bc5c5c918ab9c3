"""Recipe sections of the likelihoods, and the dict that names them. Imports no torch.

To add a likelihood: a module (see `base.py`), its section, which names the module, and a line in LIKELIHOODS.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from vaescale.config import (
    CODE_MASS,
    DECODED_MEAN,
    MEAN_ALONE,
    SIGMA_OF_ANY_SIZE,
    SIGMA_OF_DRAWS,
    UNBOUNDED_MEAN,
    UNCOMPILED,
    Config,
    Need,
    Property,
    Sizes,
    Window,
)

MOST_CHAINED = 4  # channels of a mixture: its mean takes 8 times as long for each more
MOST_RADIUS = 8
MOST_LOGITS = 256  # of a value, one for each level
SCALE_CEILING = 20.0  # largest scale of a discretized logistic on [-1, 1]; beyond it float32 cannot resolve the masses of the levels
OPTIMAL = ("optimal", "optimal_per_image", "optimal_per_pixel", "optimal_per_channel")
HORIZON_SHARE = 0.1  # of training, in which the running sigma is averaged,
MOST_HORIZON_STEPS = 100.0  # and at most so many steps
FORMER_DEFAULTS = {"horizon_steps": MOST_HORIZON_STEPS}  # in recipes that earlier versions saved
Positive = Annotated[float, Field(gt=0)]


class LikelihoodConfig(Config):
    """The section of one p(x|z). Its implementation is a `base.Likelihood`, built with image_shape=(C, H, W)."""

    measure: ClassVar[Literal["density", "mass"]] = "density"
    """Whether log_prob is a density or a mass: bits per dimension add the images' depth for a density only, so the two are not comparable."""

    own_levels: ClassVar[int | None] = None
    """The number of values that a pixel has under a mass; None for as many as the images have."""

    _window: Window = PrivateAttr(default=Window())

    kind: str

    def offers(self) -> frozenset[Property]:
        """The properties of importance weights, a sigma that is not fitted to the mean over draws, and of losses of decoded images."""
        return frozenset({SIGMA_OF_DRAWS, DECODED_MEAN})

    @property
    def window(self) -> Window:
        """The stored values of the images that are 0 and 1."""
        return self._window

    @property
    def levels(self) -> int | None:
        """The number of values that a pixel has; None for real numbers, which have a density only."""
        return self.own_levels or self.window.levels

    def seen_in(self, window: Window) -> Self:
        """The section for images of another window than 8 bits."""
        section = self.model_copy()
        section._window = window
        return section

    def resolved(self, steps: int) -> Self:  # noqa: ARG002
        """The section with numbers for what depends on the number of training steps."""
        return self

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a mass over levels for real numbers."""
        if self.measure == "mass" and self.own_levels is None and sizes.levels is None:
            raise ValueError(
                f"likelihood.kind (={self.kind}) is a mass over levels, and data.dtype float32 has none; take a density such as "
                "gaussian, laplace or student_t, or integers"
            )


class Handover(Config):
    """Two stages: the optimal sigma of the batch first, then the predicted sigma. Lin, Roberts & Jaques 2019."""

    at_step: int | None = Field(
        default=None, ge=1, description="optimizer step at which the second stage begins"
    )
    when_settled: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of at_step: begin when sigma changes by less than this fraction between two windows of "
        "horizon_steps steps",
    )
    ramp_steps: int = Field(
        default=100,
        ge=1,
        description="steps over which log sigma moves from the optimal to the predicted one",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> "Handover":
        if self.at_step is None and self.when_settled is None:
            raise ValueError("neither at_step nor when_settled is given; give one, such as when_settled: 0.1")
        if self.at_step is not None and self.when_settled is not None:
            raise ValueError("at_step and when_settled exclude each other; set one of them to null")
        return self


class DensityConfig(LikelihoodConfig):
    """Keys of the continuous families."""

    dequantize: bool = Field(
        default=False,
        description="add uniform noise of one level, for 8 bits (255 x + u) / 256, so that bits_per_dim bounds a code length",
    )

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse noise of one level where there are none."""
        if self.dequantize and sizes.levels is None:
            raise ValueError(
                f"likelihood.dequantize (={self.dequantize}) adds noise of one level, and data.dtype float32 has none; leave it out"
            )


class MeanConfig(DensityConfig):
    """Keys of the continuous families with a decoded mean."""

    mean: Literal["sigmoid", "identity"] = Field(
        default="sigmoid",
        description="how the decoder's output becomes the mean: `sigmoid` maps it into (0, 1), `identity` leaves it "
        "unbounded (linear models, latents)",
    )

    def offers(self) -> frozenset[Property]:
        """With that of latents where the mean is unbounded and x is not dequantized."""
        latents = self.mean == "identity" and not self.dequantize
        return super().offers() | ({UNBOUNDED_MEAN} if latents else frozenset())


class LocationScaleConfig(MeanConfig):
    """Keys of the families with a decoded mean and a standard deviation."""

    sigma: (
        Positive
        | Literal[
            "shared",
            "optimal",
            "optimal_per_image",
            "optimal_per_pixel",
            "optimal_per_channel",
            "predicted",
        ]
    ) = Field(
        default="optimal",
        description="a number; `shared`: one learned value; `optimal...`: the maximum-likelihood value of the global "
        "batch; `predicted`: a function of z",
    )
    sigma_source: Literal["batch", "running"] = Field(
        default="batch",
        description="the optimal sigma that the loss uses: the batch's or the running average; evaluation always "
        "uses the running average",
    )
    sigma_gradient: Literal["stop", "keep"] = Field(
        default="stop",
        description="whether gradients pass through an optimal sigma; both choices give the same gradient except "
        "during a handover's ramp, and `stop` costs one collective less",
    )
    sigma_floor: float = Field(
        default=1e-4, gt=0, description="lower bound of every sigma except a number given as `sigma`"
    )
    initial_sigma: float = Field(
        default=0.25,
        gt=0,
        description="initial value of a `shared` or `predicted` sigma; about the standard deviation of a photograph's "
        "pixels",
    )
    horizon_steps: float | None = Field(
        default=None,
        ge=1,
        description="averaging horizon of the running sigma, in optimizer steps; null: a tenth of training.steps, at most 100",
    )
    handover: Handover | None = Field(
        default=None, description="train with the optimal sigma first, then with the predicted one"
    )

    def offers(self) -> frozenset[Property]:
        """Without that of importance weights if sigma is fitted to the mean over draws; with that of resized images unless sigma
        belongs to a pixel or is fitted to an image; with that of the mean alone unless sigma is learned.
        """
        fitted = self.sigma in OPTIMAL or self.handover is not None
        offered = super().offers() - {SIGMA_OF_DRAWS} if fitted else super().offers()
        offered = offered if self.sigma in ("shared", "predicted") else offered | {MEAN_ALONE}
        return (
            offered
            if self.sigma in ("optimal_per_image", "optimal_per_pixel")
            else offered | {SIGMA_OF_ANY_SIZE}
        )

    @property
    def has_running_sigma(self) -> bool:
        """Whether sigma is averaged over steps."""
        return self.sigma in OPTIMAL or self.handover is not None

    def resolved(self, steps: int) -> Self:
        """The section with a number for the horizon of the running sigma."""
        if self.horizon_steps is not None or not self.has_running_sigma:
            return self
        horizon = min(MOST_HORIZON_STEPS, max(1.0, steps * HORIZON_SHARE))
        return self.model_copy(update={"horizon_steps": horizon})

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a handover that begins after the last step."""
        super().check_sizes(sizes)
        if self.handover and (self.handover.at_step or 0) >= sizes.steps:
            raise ValueError(
                f"likelihood.handover.at_step (={self.handover.at_step}) must be below training.steps (={sizes.steps})"
            )

    @model_validator(mode="after")
    def _keys_have_a_meaning(self) -> "LocationScaleConfig":
        if self.handover and self.sigma != "predicted":
            raise ValueError(f"handover has no meaning with sigma: {self.sigma}; it needs sigma: predicted")
        if self.sigma == "optimal_per_image" and self.sigma_source == "running":
            raise ValueError(
                "sigma_source (=running) has no meaning with sigma: optimal_per_image; remove it"
            )
        unused = [] if isinstance(self.sigma, str) else ["sigma_floor", "initial_sigma"]
        if not self.has_running_sigma:
            unused += ["sigma_source", "sigma_gradient", "horizon_steps"]
        for name in unused:
            default = type(self).model_fields[name].default
            if (value := getattr(self, name)) not in (default, FORMER_DEFAULTS.get(name, default)):
                raise ValueError(
                    f"{name} (={value}) has no meaning with sigma: {self.sigma}; remove it, or set it to {default}"
                )
        if self.sigma_floor >= self.initial_sigma:
            raise ValueError(
                f"sigma_floor (={self.sigma_floor}) must be below initial_sigma (={self.initial_sigma})"
            )
        return self


class GaussianConfig(LocationScaleConfig):
    """Independent Gaussian values around a decoded mean."""

    implementation = "vaescale.likelihoods.gaussian.Gaussian"
    kind: Literal["gaussian"] = "gaussian"


class LaplaceConfig(LocationScaleConfig):
    """Independent Laplace values around a decoded mean; sigma is the standard deviation."""

    implementation = "vaescale.likelihoods.laplace.Laplace"
    kind: Literal["laplace"] = "laplace"


class StructuredGaussianConfig(MeanConfig):
    """Gaussian values around a decoded mean, correlated between neighbouring pixels."""

    implementation = "vaescale.likelihoods.structured_gaussian.StructuredGaussian"
    kind: Literal["structured_gaussian"] = "structured_gaussian"
    radius: int = Field(
        default=1, ge=1, description="radius of the square neighbourhood: 1 is 3x3 pixels, 2 is 5x5"
    )
    sigma_floor: float = Field(
        default=1e-4, gt=0, description="lower bound of each pixel's conditional sigma"
    )
    initial_sigma: float = Field(
        default=0.25, gt=0, description="initial value of each pixel's conditional sigma"
    )


class StudentTConfig(MeanConfig):
    """Student-t values around a decoded mean."""

    implementation = "vaescale.likelihoods.student_t.StudentT"
    kind: Literal["student_t"] = "student_t"
    scale: Positive | Literal["shared", "predicted"] = Field(
        default="predicted", description="a number, `shared` for one learned value, or `predicted` from z"
    )
    degrees_of_freedom: Positive | Literal["shared", "predicted"] = Field(
        default="predicted",
        description="a number (1 is Cauchy's), or learned: `shared` and `predicted` start at 10 and stay above 2",
    )
    scale_floor: float = Field(default=1e-4, gt=0, description="lower bound of a learned scale")
    initial_scale: float = Field(default=0.25, gt=0, description="initial value of a learned scale")


class ContinuousBernoulliConfig(DensityConfig):
    """A continuous Bernoulli: the cross-entropy with grey targets, normalized to a density on [0, 1]."""

    implementation = "vaescale.likelihoods.continuous_bernoulli.ContinuousBernoulli"
    kind: Literal["continuous_bernoulli"] = "continuous_bernoulli"


class BernoulliConfig(LikelihoodConfig):
    """Black and white pixels."""

    measure = "mass"
    own_levels = 2
    implementation = "vaescale.likelihoods.bernoulli.Bernoulli"
    kind: Literal["bernoulli"] = "bernoulli"
    binarize: Literal["stochastic", "threshold"] = Field(
        default="stochastic",
        description="binarization of grey values: drawn at each step with the grey level as probability, or x > 0.5",
    )


class CategoricalConfig(LikelihoodConfig):
    """One logit for each of a pixel's levels, 256 at most; of codes, one for each code."""

    measure = "mass"
    implementation = "vaescale.likelihoods.categorical.Categorical"
    kind: Literal["categorical"] = "categorical"

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse more logits than a decoder returns in reason."""
        super().check_sizes(sizes)
        if (sizes.levels or 0) > MOST_LOGITS:
            raise ValueError(
                f"likelihood.kind (=categorical) has a logit for each of {sizes.levels:,} levels, {MOST_LOGITS} at most; take "
                "bitwise, discretized_logistic or discretized_logistic_mixture, or a narrower data.range"
            )

    def offers(self) -> frozenset[Property]:
        """With that of models of codes."""
        return super().offers() | {CODE_MASS}


class BitwiseConfig(LikelihoodConfig):
    """Independent bits for each pixel: 8, or as many as the levels take."""

    measure = "mass"
    implementation = "vaescale.likelihoods.bitwise.Bitwise"
    kind: Literal["bitwise"] = "bitwise"

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a number of levels that is no power of two: the bits would have values that no pixel has."""
        super().check_sizes(sizes)
        levels = sizes.levels or 2
        if levels & (levels - 1):
            raise ValueError(
                f"likelihood.kind (=bitwise) needs a power of two of levels, and data.range has {levels:,}; widen it to "
                f"{1 << levels.bit_length():,} values, or take discretized_logistic"
            )


class DiscretizedLogisticConfig(LikelihoodConfig):
    """A logistic distribution over the levels of each pixel."""

    measure = "mass"
    implementation = "vaescale.likelihoods.discretized_logistic.DiscretizedLogistic"
    kind: Literal["discretized_logistic"] = "discretized_logistic"
    scale: Annotated[float, Field(gt=0, le=SCALE_CEILING)] | Literal["shared", "predicted"] = Field(
        default="predicted",
        description="scale on [-1, 1]: a number, `shared` for one learned value per channel, or `predicted` from z",
    )


class DiscretizedLogisticMixtureConfig(LikelihoodConfig):
    """A mixture of discretized logistics, each channel conditioned on the channels before it."""

    measure = "mass"
    implementation = "vaescale.likelihoods.discretized_logistic.DiscretizedLogisticMixture"
    kind: Literal["discretized_logistic_mixture"] = "discretized_logistic_mixture"
    components: int = Field(default=10, ge=1, description="number of mixture components")
    first_scale: float = Field(
        default=0.25,
        gt=0,
        description="scale on [-1, 1] that raw parameters of 0 give, as those of a new network nearly are",
    )
    scale_ceiling: float | None = Field(
        default=SCALE_CEILING,
        gt=0,
        description="smooth bound of the scale on [-1, 1]; beyond 20 float32 does not resolve the masses of the levels; null: "
        "none",
    )

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse many channels: the mean sums over groups of levels of each channel before."""
        super().check_sizes(sizes)
        if sizes.channels > MOST_CHAINED:
            raise ValueError(
                f"likelihood.kind (={self.kind}) conditions each channel on those before it, {MOST_CHAINED} at most, and "
                f"data.channels is {sizes.channels}; take discretized_logistic"
            )


class AutoregressiveLogisticMixtureConfig(DiscretizedLogisticMixtureConfig):
    """A mixture of discretized logistics given z and the pixels before that are near: a local autoregressive decoder."""

    implementation = "vaescale.likelihoods.autoregressive.AutoregressiveLogisticMixture"
    kind: Literal["autoregressive_logistic_mixture"] = "autoregressive_logistic_mixture"  # type: ignore[assignment]
    components: int = Field(default=5, ge=1, description="number of mixture components")
    radius: int = Field(
        default=3,
        ge=1,
        le=MOST_RADIUS,
        description="how many rows up and columns to either side a pixel sees; what is farther away, only z tells",
    )
    width: int = Field(
        default=64,
        ge=1,
        description="channels of the network at each pixel, and features that the decoder returns for it",
    )
    blocks: int = Field(default=2, ge=1, description="residual blocks of the network at each pixel")
    relative: bool = Field(
        default=True,
        description="whether the network sees and returns differences from the mean of the pixel to the left and the one above, in which "
        "photographs are learned many times as fast; false leaves more to z",
    )

    def offers(self) -> frozenset[Property]:
        """Without that of losses of decoded images: its mean is computed pixel after pixel, without a gradient."""
        return super().offers() - {DECODED_MEAN}

    def needs(self) -> Iterable[Need]:
        """A model that is not compiled, for the same reason."""
        yield Need(f"likelihood.kind (={self.kind})", UNCOMPILED, "set training.compile to false")


LIKELIHOODS: dict[str, type[LikelihoodConfig]] = {
    "gaussian": GaussianConfig,
    "structured_gaussian": StructuredGaussianConfig,
    "laplace": LaplaceConfig,
    "student_t": StudentTConfig,
    "continuous_bernoulli": ContinuousBernoulliConfig,
    "bernoulli": BernoulliConfig,
    "categorical": CategoricalConfig,
    "bitwise": BitwiseConfig,
    "discretized_logistic": DiscretizedLogisticConfig,
    "discretized_logistic_mixture": DiscretizedLogisticMixtureConfig,
    "autoregressive_logistic_mixture": AutoregressiveLogisticMixtureConfig,
}
