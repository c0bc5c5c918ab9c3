"""The base of every recipe section, and the types of sections that come in several kinds.

A section says itself what it needs of the others (`needs`), what it offers them (`offers`) and which sizes it refuses
(`check_sizes`), so that `recipe.py` only loops over sections.
"""

import importlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


class Property(NamedTuple):
    """A property that one section needs of another. section: the recipe key of the section that offers it."""

    section: str
    meaning: str


ONE_VECTOR = Property("network", "a single latent vector or map")
LATENT_MAP = Property("network", "a single latent map")
GROUPS = Property("network", "groups of latents")
GAUSSIAN = Property("posterior", "a Gaussian q(z|x)")
SIGMA_OF_ANY_SIZE = Property("likelihood", "a sigma for images of any size")
UNBOUNDED_MEAN = Property("likelihood", "an unbounded mean of values that are not quantized")
UNCOMPILED = Property("training", "an uncompiled model")
UNSCALED_LOSS = Property("training", "a loss that is not scaled")
MEAN_ALONE = Property(
    "likelihood", "a decoder of the mean alone, with a sigma that is a number or an optimal one"
)
FIXED_POSTERIOR = Property("posterior", "constant standard deviations")
CODE_MAPS = Property("data", "codes of another run")
CODE_MASS = Property("likelihood", "a mass over any number of codes")
CODE_MODEL = Property("network", "a model of codes")
TAKES_CONDITION = Property("network", "layers that take a condition")
CONDITIONED_LOSS = Property("objective", "a loss of a conditional model")
LEARNED_PRIOR = Property("objective", "a loss without a comparison with N(0, I)")
IMAGES = Property("data", "images")
SEQUENCES = Property("data", "sequences of frames")
SEQUENCE_MODEL = Property("network", "a model of sequences")
DECODED_MEAN = Property("likelihood", "a decoded mean")
SIGMA_OF_DRAWS = Property("likelihood", "a sigma that is not fitted to the mean over draws")


class Need(NamedTuple):
    """A key of a section that works only with a property of another section, and what a user does without it."""

    key: str
    property: Property
    remedy: str


class Sizes(NamedTuple):
    """Sizes of a recipe that concern several sections. micro_batch: images per forward pass over all processes.

    levels: the number of integers in data.range, None for real numbers; channels: of the images; frames: of a sequence, else None.
    """

    latent_dim: int
    steps: int
    global_batch: int
    micro_batch: int
    levels: int | None = 256
    channels: int = 1
    frames: int | None = None


Dtype = Literal["uint8", "uint16", "int16", "float32"]
"""The types of stored values."""

WHOLE: dict[Dtype, tuple[float, float] | None] = {
    "uint8": (0, 255),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "float32": None,
}
"""The range of each type; None for real numbers, which have none that images use."""


class Window(NamedTuple):
    """The stored values that are 0 and 1 in the model: x = (value - low) / (high - low), clipped to [0, 1]."""

    dtype: Dtype = "uint8"
    low: float = 0
    high: float = 255

    @property
    def levels(self) -> int | None:
        """The number of integers in the window; None for real numbers."""
        return None if self.dtype == "float32" else int(self.high - self.low) + 1

    @property
    def bits(self) -> float | None:
        """The depth log2(levels) in bits, 8 for 0 to 255; None for real numbers."""
        return None if self.levels is None else math.log2(self.levels)

    @property
    def clips(self) -> bool:
        """Whether the type has values outside of the window."""
        return (self.low, self.high) != WHOLE[self.dtype]

    def text(self) -> str:
        """The window as a sentence has it: uint16 from 0 to 4095."""
        return f"{self.dtype} from {self.low:g} to {self.high:g}"


Size = int | tuple[int, int]
"""The size of images: the side of a square, or height and width."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_of(height: int, width: int) -> Size:
    """The size as recipes have it."""
    return height if height == width else (height, width)


def size_text(size: Size) -> str:
    """A size as it is written in a recipe."""
    return str(size_of(*sides(size))).replace("(", "[").replace(")", "]")


def option_of(size: Size) -> str:
    """A size as command lines have it: 64, or 48x96."""
    return "x".join(map(str, (size,) if isinstance(size, int) else size))


def import_named(name: str) -> Any:
    """Import what a full name such as `vaescale.networks.conv.ConvNetwork` names."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


class Config(BaseModel):
    """A recipe section. Refuses unknown keys, NaN, Inf, and what YAML makes a truth value or a number by surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    implementation: ClassVar[Any] = None
    """What a section of several kinds configures: a class, or its full name, which is imported when it is first built."""

    def implement(self, *arguments: Any, **keywords: Any) -> Any:
        """An instance of the implementation, built from this section and what else its contract asks for."""
        is_name = isinstance(self.implementation, str)
        implementation = import_named(self.implementation) if is_name else self.implementation
        return implementation(self, *arguments, **keywords)

    def offers(self) -> frozenset[Property]:
        """The properties that other sections may need."""
        return frozenset()

    def needs(self) -> Iterable[Need]:
        """What this section needs of the others."""
        return ()

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise ValueError when the section does not fit the recipe's sizes."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_surprises_of_yaml(cls, values: Any) -> Any:
        # YAML 1.1 reads `yes` and `on` as true, which pydantic takes for 1, and 20261127_142530 as 20261127142530.
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(
                    f"{name} (={value}) is a truth value, which YAML makes of yes, no, on and off; quote it or write a number"
                )
            if isinstance(value, int | float) and field is not None and field.annotation in (str, str | None):
                raise ValueError(
                    f"{name} (={value}) is a number, and may be written otherwise; put it in quotes"
                )
        return values


Section = TypeVar("Section", bound=Config)


class OneOf(Generic[Section]):
    """A pydantic annotation for a section that comes in several kinds: `Annotated[NetworkConfig, OneOf(NETWORKS)]`.

    kinds: the value of `kind:` -> the section's class. The mapping is read at validation, so a kind that somebody adds
    to it is known at once. default: the kind of a section that names none. optional: null is no section.
    """

    def __init__(
        self, kinds: Mapping[str, type[Section]], default: str | None = None, *, optional: bool = False
    ) -> None:
        self.kinds, self._default, self._optional = kinds, default, optional

    def validate(self, value: Any) -> Section:
        """A section's values, or a section, to the section. Raises pydantic's own errors."""
        if type(value) in self.kinds.values():
            return cast(Section, value)
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_type", {"class_name": "section"})
        kind = value.get("kind", self._default)
        if kind is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        if not isinstance(kind, str) or kind not in self.kinds:
            expected = ", ".join(map(repr, self.kinds))
            tags = {"discriminator": "'kind'", "tag": str(kind), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", tags)
        return self.kinds[kind].model_validate({**value, "kind": kind})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """What pydantic calls to learn how the type is validated and written."""
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda section, info: section.model_dump(mode=info.mode), info_arg=True
        )
        one = core_schema.no_info_plain_validator_function(self.validate, serialization=dump)
        return core_schema.nullable_schema(one) if self._optional else one


def one_of(sections: Iterable[type[Config]]) -> Any:
    """The type of a section that is one of some classes, told apart by the default of their `kind` field."""
    return Annotated[Config, OneOf({section.model_fields["kind"].default: section for section in sections})]


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """`{"data": {"train": 1}}` to `{"data.train": 1}`."""
    if not isinstance(content, dict):
        return {prefix: content}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items()]
    return {key: value for part in parts for key, value in part.items()}


UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(value: Any) -> Any:
    """`100MB`, `1.5GiB` or a number to a number of bytes. Raises ValueError for other strings."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", value.strip().upper())
    if match is None or match[2] not in UNITS:
        raise ValueError("give a number of bytes or a size such as 100MB")
    return int(float(match[1]) * UNITS[match[2]])
