"""Recipe sections of training and of the optimizer. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vaescale.config import UNCOMPILED, UNSCALED_LOSS, Config, Property, Sizes

Beta = Annotated[float, Field(ge=0, lt=1)]
MOST_SIGMA_REL = 0.2886  # a power-function average with the exponent 0 has 1 / sqrt(12)
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class WatchConfig(Config):
    """A held-out metric that should fall."""

    metric: str = Field(
        default="val/neg_elbo_nats",
        pattern="^val/",
        description="metric of the evaluations in training; smaller is better",
    )
    patience: int = Field(
        default=5, gt=0, description="number of evaluations in a row that may bring no improvement"
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="a value counts as an improvement if it is lower than the best one by more than this",
    )


class PlateauConfig(WatchConfig):
    """When and how far `schedule: plateau` lowers the learning rate."""

    factor: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="factor of the learning rate at each plateau, down to final_fraction of lr",
    )


class EarlyStoppingConfig(WatchConfig):
    """When training ends before its last step, with a checkpoint."""


class OptimizerConfig(Config):
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019), and its learning rate over training."""

    kind: Literal["adam", "adamw"] = Field(default="adamw", description="the optimizer")
    lr: float = Field(gt=0, description="highest learning rate")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="decay rates of the two moment estimates"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay of the parameters that `decay` names"
    )
    decay: Literal["kernels", "all"] = Field(
        default="kernels",
        description="what decays: kernels and matrices, or every parameter, biases and norms too",
    )
    epsilon: float = Field(
        default=1e-8,
        gt=0,
        description="Adam's epsilon, added to the root of the second moment of a gradient in nats per image",
    )
    schedule: Literal["cosine", "constant", "plateau"] = Field(
        default="cosine",
        description="learning rate after the warm-up; `plateau` lowers it when a held-out metric no longer falls",
    )
    plateau: PlateauConfig | None = Field(
        default=None, description="of `schedule: plateau`; null: its defaults"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the learning rate rises linearly from 0"
    )
    warmup_from_zero: bool = Field(
        default=False,
        description="begin the warm-up with a learning rate of 0, which moves no weights, in place of lr / warmup_steps",
    )
    schedule_start: int = Field(
        default=0,
        ge=0,
        description="step at which warm-up and cosine begin: to go on with a finished run, its number of steps",
    )
    final_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="learning rate at the cosine's last step, or the lowest one of a plateau, as a fraction of lr",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest gradient norm; the loss is in nats per image, so norms grow with the number of pixels: "
        "clip_norm_per_dimension is the same for images of any size; null: no clipping",
    )
    clip_norm_per_dimension: float | None = Field(
        default=None,
        gt=0,
        description="clip_norm as a multiple of D, the number of values of an image; that of VDVAE's authors is "
        "130 to 220; null: clip_norm counts",
    )
    skip_factor: float | None = Field(
        default=None,
        gt=1,
        description="skip steps whose gradient norm is this many times the usual one (see training/guard.py); for "
        "deep ladders; null: skip none",
    )
    skip_norm: float | None = Field(
        default=None,
        gt=0,
        description="skip steps whose gradient norm, before clipping, is at least this; a run whose norms stay above it "
        "learns nothing more; null: skip none",
    )
    skip_norm_per_dimension: float | None = Field(
        default=None, gt=0, description="skip_norm as a multiple of D; null: skip_norm counts"
    )

    def resolved(self, dimensions: int) -> Self:
        """The section with norms for images of D values. Raises ValueError for two different ones."""
        norms: dict[str, float] = {}
        for key in ("clip_norm", "skip_norm"):
            given, factor = getattr(self, key), getattr(self, f"{key}_per_dimension")
            if factor is None:
                continue
            norms[key] = factor * dimensions
            if given is not None and given != norms[key]:
                raise ValueError(
                    f"optimizer.{key} (={given:g}) is not optimizer.{key}_per_dimension (={factor:g}) times D (={dimensions}), "
                    f"{norms[key]:g}; set one of them to null"
                )
        return self.model_copy(update=norms) if norms else self

    @property
    def plateau_or_default(self) -> PlateauConfig | None:
        """The section `plateau` of a `schedule: plateau`; None of other schedules."""
        return (self.plateau or PlateauConfig()) if self.schedule == "plateau" else None

    @model_validator(mode="after")
    def _plateau_has_a_meaning(self) -> "OptimizerConfig":
        if self.plateau and self.schedule != "plateau":
            raise ValueError(
                f"plateau belongs to `schedule: plateau`, this is {self.schedule}; remove one of them"
            )
        return self

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse a schedule that begins after the last step."""
        if self.schedule_start >= sizes.steps:
            raise ValueError(
                f"optimizer.schedule_start (={self.schedule_start}) must be below training.steps (={sizes.steps})"
            )


class InitConfig(Config):
    """Weights to begin from, in place of random ones."""

    path: str = Field(
        description="a run folder, one of its checkpoints, a folder of `vaescale export`, diffusers' AutoencoderKL, or a .safetensors file"
    )
    take: Literal["all", "network", "encoder", "decoder"] = Field(
        default="all",
        description="what is taken; `all` is the network and, of the same likelihood, what that has learned, such as sigma",
    )
    weights: str = Field(
        default="ema",
        description="`ema`, the averaged weights where there are any, `raw`, or another average by its name",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_a_path_alone(cls, values: object) -> object:
        return {"path": values} if isinstance(values, str) else values


class TrainingConfig(Config):
    """Length and precision of training, and the intervals of logs, evaluations and checkpoints."""

    steps: int = Field(gt=0, description="number of optimizer steps; not needed with `epochs`")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="length of training in passes over the training images, in place of `steps`, which follow from the index of the "
        "shards when the recipe is read; null: steps count",
    )
    precision: Precision = Field(
        default="bf16",
        description="precision of the forward pass (weights stay float32); fp16 also scales the loss; tf32 is fp32 "
        "with a GPU's TF32 products",
    )
    accumulation: int = Field(
        default=1,
        gt=0,
        description="micro-batches per optimizer step; each has its own optimal sigma in the loss",
    )
    channels_last: bool = Field(
        default=False,
        description="store weights and maps as [B, H, W, C]; on a GPU bf16 and fp16 always do, on a CPU networks with "
        "normalization for images of at least 28x28; for ddp",
    )
    compile: bool = Field(
        default=False,
        description="compile the model with torch.compile, which takes minutes at the start; for ddp, zero1 and zero2",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="on one GPU, capture a step's passes once and replay them: the same values, much faster where the host "
        "cannot launch kernels as fast as the GPU runs them; keeps the memory of a step",
    )
    ema_decay: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="decay of the averaged weights, approached as min(ema_decay, (1 + step) / (10 + step)); 0: no average",
    )
    ema_warmup: bool = Field(
        default=True,
        description="approach ema_decay as it says; false: average with ema_decay from the first step, so that the initial "
        "weights count for 1 / (1 - ema_decay) steps",
    )
    ema_more: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(),
        description="decays of further averages, such as [0.9999], each a copy of the weights; `--weights ema-0.9999` takes one",
    )
    ema_sigma_rel: tuple[Annotated[float, Field(gt=0, lt=MOST_SIGMA_REL)], ...] = Field(
        default=(),
        description="standard deviations of power-function averages as shares of training, such as [0.05, 0.1], which "
        "`vaescale average` turns into averages of any length; needs keep_every",
    )
    log_every: int = Field(default=10, gt=0, description="steps between two rows of training metrics")
    evaluate_every: int = Field(default=200, gt=0, description="steps between two evaluations on data.val")
    evaluate_images: int | None = Field(
        default=None,
        gt=0,
        description="number of images of data.val that these evaluations measure, the first ones; null: all; `vaescale "
        "evaluate` measures all",
    )
    checkpoint_every: int = Field(default=200, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(default=2, gt=0, description="number of newest checkpoints that are kept")
    keep_every: int | None = Field(
        default=None, gt=0, description="also keep checkpoints whose step is a multiple of this number"
    )
    keep_best: str | None = Field(
        default=None,
        pattern="^val/",
        description="also keep the checkpoint with the smallest value of this metric, such as val/neg_elbo_nats; the option "
        "`--checkpoint best` of the other verbs takes it",
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None,
        description="end training when a held-out metric no longer falls, such as {patience: 10}; null: train all steps",
    )
    resume: Literal["auto", "never"] = Field(
        default="auto", description="`never` refuses a run folder that holds a run"
    )
    max_non_finite: int = Field(
        default=10,
        gt=0,
        description="stop after this many consecutive steps whose loss or gradient is NaN or Inf; such steps change "
        "no weights",
    )
    max_rollbacks: int = Field(
        default=0,
        ge=0,
        description="how many times to return to the last checkpoint, with the learning rate halved, before giving up",
    )
    watchdog_seconds: float | None = Field(
        default=900,
        gt=0,
        description="stop and say where each process is when one makes no progress for this long; null: never",
    )
    compare_replicas_every: int | None = Field(
        default=None,
        gt=0,
        description="steps between two checks that all processes hold the same weights, bit for bit; null: never",
    )

    def offers(self) -> frozenset[Property]:
        """The properties of terms whose shapes change from step to step, and of a second player."""
        uncompiled = frozenset() if self.compile else frozenset({UNCOMPILED})
        return uncompiled if self.precision == "fp16" else uncompiled | {UNSCALED_LOSS}

    @model_validator(mode="after")
    def _measures_what_it_keeps(self) -> "TrainingConfig":
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ValueError(
                f"keep_best needs each checkpoint's own evaluation; make checkpoint_every (={self.checkpoint_every}) a "
                f"multiple of evaluate_every (={self.evaluate_every})"
            )
        return self

    @model_validator(mode="after")
    def _names_each_average_once(self) -> "TrainingConfig":
        for key in ("ema_more", "ema_sigma_rel"):
            names = [str(value) for value in getattr(self, key)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key} names {twice[0]} twice; name each average once")
        return self
