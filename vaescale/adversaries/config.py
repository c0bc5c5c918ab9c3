"""Recipe sections of the second player: its networks, its losses and its optimizer. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vaescale.config import Config, Sizes

Width = Annotated[int, Field(gt=0)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Loss = Literal["hinge", "non_saturating", "vanilla"]
Augmentation = Literal["colour", "translation", "cutout"]


class PlayerConfig(Config):
    """What each second player has: a loss, regularization, an optimizer, and the steps at which it plays."""

    loss: Loss = Field(
        default="non_saturating",
        description="loss of both players; `vanilla` is the minimax game, `non_saturating` has another loss for the autoencoder",
    )
    start_step: int = Field(
        default=0,
        ge=0,
        description="the first step at which the players see each other; before it neither does",
    )
    steps_per_step: int = Field(
        default=1, gt=0, description="updates of the discriminators in a step in which they play"
    )
    every: int = Field(
        default=1,
        gt=0,
        description="steps of the autoencoder from one step of the discriminators to the next",
    )
    lr: float | None = Field(
        default=None, gt=0, description="highest learning rate of the discriminators; null: optimizer.lr"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.5, 0.9), description="decay rates of their Adam")
    schedule: Literal["cosine", "constant"] = Field(
        default="constant", description="their learning rate after the warm-up"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps from start_step over which their learning rate rises linearly"
    )
    ema_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="decay of an average of the discriminators' weights over the steps in which they play, which checkpoints hold beside the "
        "weights; null: no average",
    )
    spectral_norm: bool = Field(
        default=False, description="divide each weight by its largest singular value (Miyato et al. 2018)"
    )
    r1: float = Field(
        default=0.0,
        ge=0,
        description="gamma of gamma/2 |gradient of the logit|^2 at the data (Mescheder et al. 2018); computed in float32",
    )
    r2: float = Field(default=0.0, ge=0, description="gamma of the same penalty at what the model makes")
    lecam: float = Field(
        default=0.0,
        ge=0,
        description="weight of the distance of the logits from the running means of the other side (Tseng et al. 2021: 1e-3)",
    )

    def plays(self, step: int) -> bool:
        """Whether the discriminators are updated in this step: the last of each `every` steps, among which logged steps are."""
        return step >= self.start_step and (step + 1 - self.start_step) % self.every == 0

    def check_start(self, key: str, sizes: Sizes) -> None:
        """Raise ValueError where training ends before the players see each other. key: the section's."""
        if self.start_step >= sizes.steps:
            raise ValueError(
                f"{key}.start_step (={self.start_step}) must be below training.steps (={sizes.steps})"
            )


class LatentPlayerConfig(PlayerConfig):
    """A discriminator of latents: a multilayer perceptron."""

    latent_widths: Widths = Field(default=(256, 256), description="units of its hidden layers")


class ImagePlayerConfig(PlayerConfig):
    """A discriminator of images."""

    network: Literal["dcgan", "patch"] = Field(
        default="dcgan",
        description="`dcgan`: one logit an image; `patch`: one for each patch (PatchGAN, Isola et al. 2017)",
    )
    widths: Widths = Field(default=(64, 128), description="channels after each halving of the resolution")
    norm: Literal["group", "none"] = Field(
        default="none", description="normalization after all convolutions but the first"
    )
    augment: tuple[Augmentation, ...] = Field(
        default=(), description="DiffAugment of all images that it sees (Zhao et al. 2020)"
    )

    @model_validator(mode="after")
    def _augments_once(self) -> "ImagePlayerConfig":
        if len(set(self.augment)) < len(self.augment):
            raise ValueError(f"augment (={list(self.augment)}) names one twice; name each once")
        return self


class BothPlayersConfig(ImagePlayerConfig, LatentPlayerConfig):
    """A discriminator of images and one of latents."""


class PairPlayerConfig(ImagePlayerConfig):
    """A discriminator of pairs of latents and images."""

    hidden: int = Field(
        default=256, gt=0, description="units of the layer that sees latents and maps together"
    )


class AdversarialConfig(ImagePlayerConfig):
    """A loss term: a discriminator's judgement of the decoded means, and the discriminator."""

    loss: Loss = Field(
        default="hinge",
        description="loss of both players; `vanilla` is the minimax game, `non_saturating` has another loss for the autoencoder",
    )
    weight: float = Field(default=1.0, gt=0, description="weight of the term")
    adaptive: bool = Field(
        default=True,
        description="multiply the weight by the ratio of the gradient norms of -log p(x|z) and of the term at the decoder's last "
        "layer, over the global batch (Esser et al. 2021)",
    )
