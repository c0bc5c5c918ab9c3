"""The recipe sections of a condition y: p(x|z, y), q(z|x, y) and, if wanted, p(z|y). Imports no torch."""

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, field_validator

from vaescale.config import (
    CONDITIONED_LOSS,
    GAUSSIAN,
    IMAGES,
    LEARNED_PRIOR,
    ONE_VECTOR,
    TAKES_CONDITION,
    UNCOMPILED,
    Config,
    Need,
)

PRIOR = (
    "learn a mean and a log sigma of p(z|y) for each {what}, in place of N(0, I); a ladder's priors read the {what} "
    "anyway"
)
DROPOUT = (
    "share of the training images whose {what} is hidden from the model, which then has a vector for `none`"
)


class ConditionConfig(Config):
    """What the kinds of conditions have in common."""

    kind: str
    width: int = Field(
        default=64,
        gt=0,
        le=4096,
        description="size of the learned vector, of which linear layers make the scales and shifts of each block's channels",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    prior: bool = False

    @property
    def words(self) -> str:
        """What y is, for sentences."""
        raise NotImplementedError

    def needs(self) -> Iterable[Need]:
        """The needs of layers that take it, of a loss that it may enter, of images, and of an uncompiled model."""
        key = f"condition.kind (={self.kind!r})"
        yield Need(
            key,
            TAKES_CONDITION,
            "choose network.kind conv, resnet, ladder, mlp or linear, or leave condition out",
        )
        yield Need(key, GAUSSIAN, "choose posterior.kind diagonal, isotropic, fixed or relative")
        yield Need(
            key,
            CONDITIONED_LOSS,
            "choose elbo without spectral and equivariance, or iwae",
        )
        yield Need(key, IMAGES, "leave condition out of a model of latents")
        yield Need(key, UNCOMPILED, "set training.compile to false")
        if self.prior:
            yield Need(
                "condition.prior (=True)",
                LEARNED_PRIOR,
                "set it to false, or leave objective.mmd and objective.dip out",
            )
            yield Need(
                "condition.prior (=True)",
                ONE_VECTOR,
                "set it to false: the priors of a ladder's groups depend on the condition already",
            )


class ClassCondition(ConditionConfig):
    """The class of each image as a condition of the encoder and the decoder."""

    implementation = "vaescale.conditions.embedding.ClassEmbedding"
    kind: Literal["class"] = "class"
    classes: int = Field(ge=2, le=100_000, description="K, the number of classes; labels are from 0 to K - 1")
    dropout: float = Field(default=0.0, ge=0, lt=1, description=DROPOUT.format(what="class"))
    prior: bool = Field(default=False, description=PRIOR.format(what="class"))

    @property
    def words(self) -> str:
        """The classes in words."""
        return f"{self.classes} classes"


class VectorCondition(ConditionConfig):
    """A vector of each image, such as attributes, angles or an embedding, as a condition of the encoder and the decoder."""

    implementation = "vaescale.conditions.embedding.VectorEmbedding"
    kind: Literal["vector"] = "vector"
    size: int = Field(ge=1, le=16_384, description="V, the number of values of each vector")
    member: str = Field(
        description="the member of each sample that holds its vector: `json:KEY`, a number or a list of numbers in its KEY.json, or the "
        "ending of a NumPy file, such as attributes.npy",
    )

    @field_validator("member")
    @classmethod
    def _is_npy_or_json(cls, member: str) -> str:
        if not re.fullmatch(r"json:\S.*|(\S+\.)?npy", member):
            raise ValueError("write json:KEY, or the ending of a NumPy file such as attributes.npy")
        return member

    standardize: bool = Field(
        default=True,
        description="subtract the mean of the training images' vectors and divide by their standard deviation, each value for itself",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description=DROPOUT.format(what="vector"))
    prior: bool = Field(
        default=False,
        description="make mean and log sigma of p(z|y) by a linear map of the vector, in place of N(0, I); a ladder's priors read the "
        "vector anyway",
    )

    @property
    def words(self) -> str:
        """The vectors in words."""
        return f"vectors of {self.size}"


CONDITIONS: dict[str, type[ConditionConfig]] = {"class": ClassCondition, "vector": VectorCondition}
"""The kinds of conditions. To add one, write a section above, its embedding in `embedding.py`, and a line here."""
