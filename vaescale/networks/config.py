"""Recipe sections of the networks, and the dict that names them. Imports no torch.

To add a network: a module (see `base.py`), its section, which names the module, and a line in NETWORKS.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from vaescale.config import (
    CODE_MAPS,
    CODE_MODEL,
    GROUPS,
    LATENT_MAP,
    ONE_VECTOR,
    SEQUENCE_MODEL,
    SEQUENCES,
    TAKES_CONDITION,
    UNCOMPILED,
    Config,
    Need,
    Property,
    Sizes,
)

Norm = Literal["group", "batch", "none"]
Width = Annotated[int, Field(gt=0)]


class Standardize(Config):
    """Mean and standard deviation of the values of the training images in [0, 1]: (x - mean) / sigma enters the encoder."""

    mean: float = Field(description="mean of the values in [0, 1]")
    sigma: float = Field(gt=0, description="their standard deviation")


Standardized = Annotated[
    Standardize | None,
    Field(
        description="mean and sigma of the training images' values in [0, 1], such as {mean: 0.47, sigma: 0.25}: "
        "(x - mean) / sigma enters the encoder; null: 2 x - 1"
    ),
]


def _listed(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Frozen = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.]+$")], ...],
    BeforeValidator(_listed),
    Field(
        description="parts that are not trained: encoder, decoder, or names of layers such as decoder.0, as in checkpoints; they "
        "have no optimizer state, and their batch normalization keeps its running statistics"
    ),
]


class NetworkConfig(Config):
    """The section of an encoder and decoder.

    Its implementation is a `base.FlatNetwork`, a `ladder.LadderNetwork` where `hierarchical`, a
    `code_transformer.CodeTransformer` where `of_codes`, or a `svg.SvgNetwork` where `of_sequences`, built with image_size,
    channels, encoder_out (channels that the posterior needs) and out_channels (channels that the likelihood needs). It
    raises UserError when the layers do not fit the image.
    """

    hierarchical: ClassVar[bool] = False
    """Whether the latents form groups that are drawn top-down."""
    of_codes: ClassVar[bool] = False
    """Whether it models codes of another run, and has no latents."""
    of_sequences: ClassVar[bool] = False
    """Whether it models sequences of frames, with latents at each step of time."""

    kind: str
    latent_dim: int
    freeze: Frozen = ()

    def offers(self) -> frozenset[Property]:
        """The property that other sections may need: groups of latents, or a single vector or map."""
        return frozenset({GROUPS if self.hierarchical else ONE_VECTOR})


class ConvConfig(NetworkConfig):
    """Strided convolutions: a DCGAN-like encoder and decoder, or a published network."""

    implementation = "vaescale.networks.conv.ConvNetwork"
    kind: Literal["conv"] = "conv"
    latent_dim: int = Field(gt=0, description="number of latents")
    widths: Annotated[tuple[Width, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="channels after each halving of the resolution; null: 32, 64, or those of the preset",
    )
    preset: Literal["sigma_vae_svhn", "wae_celeba", "infogan"] | None = Field(
        default=None, description="a published network in place of `widths`; see networks/presets.py"
    )
    norm: Norm | None = Field(
        default=None,
        description="normalization layers; `batch` takes its statistics over the global batch; null: that of "
        "the preset, or `group` without a preset",
    )
    standardize: Standardized = None
    latent_map: bool = Field(
        default=False,
        description="keep the innermost map as the latents, of latent_dim channels, by 1x1 convolutions in place of the fully "
        "connected layers",
    )

    def offers(self) -> frozenset[Property]:
        """The properties of terms that need a latent map, if it has one, and of conditions."""
        return super().offers() | {TAKES_CONDITION} | ({LATENT_MAP} if self.latent_map else set())

    @model_validator(mode="after")
    def _a_preset_has_its_widths(self) -> "ConvConfig":
        if self.preset and self.latent_map:
            raise ValueError(
                f"preset (={self.preset}) has a latent vector; leave network.latent_map out, or choose widths"
            )
        if self.preset and self.widths:
            raise ValueError(
                f"preset (={self.preset}) sets its own widths; leave network.widths out, or set it to null"
            )
        return self


class ResnetConfig(NetworkConfig):
    """Residual blocks and a latent map of 1/f of the image's size: the AutoencoderKL family."""

    implementation = "vaescale.networks.resnet.ResnetNetwork"
    kind: Literal["resnet"] = "resnet"
    latent_dim: int = Field(gt=0, description="channels of the latent map")
    width: int = Field(default=128, gt=0, description="channels at the image's resolution")
    multipliers: tuple[Width, ...] = Field(
        default=(1, 2, 4, 4),
        min_length=1,
        description="channels at each resolution from the image's down, as multiples of width",
    )
    blocks: int = Field(
        default=2, gt=0, description="residual blocks at each resolution; the decoder has one more"
    )
    attention: bool = Field(default=True, description="self-attention between the two innermost blocks")
    attention_at: tuple[Width, ...] = Field(
        default=(), description="sizes of maps that have self-attention after each block"
    )
    norm_groups: int | None = Field(
        default=None,
        gt=0,
        description="groups of every GroupNorm; null: at most 32, and at least 16 values in each",
    )
    norm_epsilon: float = Field(
        default=1e-5, gt=0, description="GroupNorm's epsilon; diffusers' AutoencoderKL has 1e-6"
    )
    standardize: Standardized = None

    def offers(self) -> frozenset[Property]:
        """The properties of terms that transform the latent map, and of conditions."""
        return super().offers() | {LATENT_MAP, TAKES_CONDITION}


class LadderConfig(NetworkConfig):
    """A hierarchy of latents of the VDVAE class: bottleneck blocks, and a group of latents in each decoder block."""

    hierarchical = True
    implementation = "vaescale.networks.ladder.LadderNetwork"
    kind: Literal["ladder"] = "ladder"
    latent_dim: int = Field(default=16, gt=0, description="channels of latents in each group")
    width: int = Field(default=64, gt=3, description="channels of the maps")
    widths: dict[int, int] = Field(
        default={}, description="channels of the maps at some resolutions, such as {256: 64}"
    )
    bottleneck: float = Field(
        default=0.25, gt=0, le=1, description="inner channels of a block as a fraction of its channels"
    )
    encoder: tuple[str, ...] | None = Field(
        default=None,
        description="blocks and pooling, such as 32x11,32d2; null: a ladder that fits the image size",
    )
    decoder: tuple[str, ...] | None = Field(
        default=None,
        description="groups and unpooling, such as 1x1,4m1; null: a ladder that fits the image size",
    )
    biases_up_to: int = Field(
        default=64, ge=0, description="largest resolution whose map starts as a learned parameter"
    )
    checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: a third slower, much less memory",
    )
    standardize: Standardized = None

    def offers(self) -> frozenset[Property]:
        """The properties of groups and of conditions."""
        return super().offers() | {TAKES_CONDITION}

    @model_validator(mode="before")
    @classmethod
    def _split_strings(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        split = {
            key: tuple(word.strip() for word in str(values[key]).split(","))
            for key in ("encoder", "decoder")
            if isinstance(values.get(key), str | int)
        }
        return {**values, **split}

    @model_validator(mode="after")
    def _widths_are_wide_enough(self) -> "LadderConfig":
        for resolution, width in self.widths.items():
            if width < 4 or resolution < 1:
                raise ValueError(f"widths ({{{resolution}: {width}}}): a width must be at least 4")
        return self


class LinearConfig(NetworkConfig):
    """A linear encoder and decoder: with an unbounded Gaussian mean, probabilistic PCA."""

    implementation = "vaescale.networks.linear.LinearNetwork"
    kind: Literal["linear"] = "linear"
    latent_dim: int = Field(gt=0, description="number of latents")

    def offers(self) -> frozenset[Property]:
        """The property of conditions too."""
        return super().offers() | {TAKES_CONDITION}


class MlpConfig(NetworkConfig):
    """Fully connected layers, whose input also enters the last one: for vectors such as another model's latents."""

    implementation = "vaescale.networks.mlp.MlpNetwork"
    kind: Literal["mlp"] = "mlp"
    latent_dim: int = Field(gt=0, description="number of latents")
    widths: tuple[Width, ...] = Field(
        default=(512, 512),
        min_length=1,
        description="sizes of the encoder's hidden layers; the decoder has them in the opposite order",
    )

    def offers(self) -> frozenset[Property]:
        """The property of conditions too."""
        return super().offers() | {TAKES_CONDITION}


class CodeTransformerConfig(NetworkConfig):
    """A causal transformer over the codes of another run, row by row, without latents: what `vaescale fit-prior` trains."""

    of_codes = True
    implementation = "vaescale.networks.code_transformer.of_config"
    kind: Literal["code_transformer"] = "code_transformer"
    latent_dim: Literal[0] = Field(default=0, description="it has no latents")
    width: int = Field(default=64, gt=0, description="channels at each place")
    layers: int = Field(default=2, gt=0, description="number of blocks of attention and two layers")
    heads: int = Field(default=4, gt=0, description="heads of each attention; they divide the width")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of the channels of each branch that training leaves out"
    )

    def offers(self) -> frozenset[Property]:
        """The property that codes need."""
        return frozenset({CODE_MODEL})

    def needs(self) -> Iterable[Need]:
        """The need of codes."""
        yield Need("network.kind (='code_transformer')", CODE_MAPS, "`vaescale fit-prior RUN` trains it")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "CodeTransformerConfig":
        if self.width % self.heads:
            raise ValueError(f"width (={self.width}) must be a multiple of heads (={self.heads})")
        return self


class SvgConfig(NetworkConfig):
    """The stochastic video model SVG: LSTMs between a frame encoder and decoder, and latents at each step of time."""

    of_sequences = True
    implementation = "vaescale.networks.svg.SvgNetwork"
    kind: Literal["svg"] = "svg"
    latent_dim: int = Field(default=10, gt=0, description="number of latents at each step of time")
    context: int = Field(
        gt=0, description="frames that are given; their maps in the encoder also enter the decoder"
    )
    horizon: int = Field(
        gt=0, description="frames that are predicted after the context; data.frames is the sum of both"
    )
    prior: Literal["learned", "fixed"] = Field(
        default="learned",
        description="p(z) of a step: from the frames before it by an LSTM (SVG-LP), or N(0, I) (SVG-FP)",
    )
    backbone: Literal["dcgan", "vgg"] = Field(
        default="dcgan",
        description="encoder and decoder of frames: strided convolutions, or blocks of 3x3 convolutions with pooling",
    )
    widths: tuple[Width, ...] = Field(
        default=(64, 128, 256, 512),
        min_length=1,
        description="channels before each halving of the resolution",
    )
    features: int = Field(default=128, gt=0, description="size of the vector of a frame")
    hidden: int = Field(default=256, gt=0, description="size of the LSTMs' states")
    predictor_layers: int = Field(default=2, gt=0, description="layers of the LSTM that predicts a frame")
    posterior_layers: int = Field(default=1, gt=0, description="layers of the LSTM of q(z|x)")
    prior_layers: int = Field(default=1, gt=0, description="layers of the LSTM of a learned prior")
    norm: Norm = Field(
        default="group",
        description="normalization layers; `batch` takes its statistics over all frames of the global batch",
    )
    standardize: Standardized = None

    @property
    def frames(self) -> int:
        """The frames of a sequence."""
        return self.context + self.horizon

    def offers(self) -> frozenset[Property]:
        """The property that sequences need."""
        return frozenset({SEQUENCE_MODEL})

    def needs(self) -> Iterable[Need]:
        """The needs of sequences, and of LSTMs, which torch does not compile."""
        key = "network.kind (='svg')"
        yield Need(key, SEQUENCES, "set data.holds=sequences and data.frames")
        yield Need(key, UNCOMPILED, "set training.compile to false")

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse sequences of another length than context and horizon."""
        if sizes.frames != self.frames:
            raise ValueError(
                f"data.frames (={sizes.frames}) must be network.context (={self.context}) plus network.horizon (={self.horizon}); set "
                f"data.frames={self.frames}"
            )


NETWORKS: dict[str, type[NetworkConfig]] = {
    "conv": ConvConfig,
    "resnet": ResnetConfig,
    "ladder": LadderConfig,
    "linear": LinearConfig,
    "mlp": MlpConfig,
    "code_transformer": CodeTransformerConfig,
    "svg": SvgConfig,
}
