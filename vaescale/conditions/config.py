"""The recipe section of a condition y: p(x|z, y), q(z|x, y) and, if wanted, p(z|y). Imports no torch."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from vaescale.config import (
    CONDITIONED_LOSS,
    GAUSSIAN,
    IMAGES,
    ONE_VECTOR,
    TAKES_CONDITION,
    UNCOMPILED,
    Config,
    Need,
)


class ClassCondition(Config):
    """The class of each image as a condition of the encoder and the decoder."""

    implementation = "vaescale.conditions.embedding.ClassEmbedding"
    kind: Literal["class"] = "class"
    classes: int = Field(ge=2, le=100_000, description="K, the number of classes; labels are from 0 to K - 1")
    width: int = Field(
        default=64,
        gt=0,
        le=4096,
        description="size of the learned vector of each class, of which linear layers make the scales and shifts of each block's channels",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the training images whose class is hidden from the model, which then has a vector for `none`",
    )
    prior: bool = Field(
        default=False,
        description="learn a mean and a log sigma of p(z|y) for each class, in place of N(0, I); a ladder's priors read the class anyway",
    )

    @property
    def rows(self) -> int:
        """The number of vectors: one for each class, and one for `none` if classes are hidden."""
        return self.classes + (self.dropout > 0)

    def needs(self) -> Iterable[Need]:
        """The needs of layers that take it, of a loss that it may enter, of images with classes, and of an uncompiled model."""
        key = f"condition.kind (={self.kind!r})"
        yield Need(key, TAKES_CONDITION, "choose network.kind conv, resnet or ladder, or leave condition out")
        yield Need(key, GAUSSIAN, "choose posterior.kind diagonal, isotropic, fixed or relative")
        yield Need(
            key,
            CONDITIONED_LOSS,
            "choose elbo without mmd, dip, spectral, equivariance, adversarial and perceptual, or iwae",
        )
        yield Need(key, IMAGES, "leave condition out of a model of latents")
        yield Need(key, UNCOMPILED, "set training.compile to false")
        if self.prior:
            yield Need(
                "condition.prior (=True)",
                ONE_VECTOR,
                "set it to false: the priors of a ladder's groups depend on the class already",
            )
