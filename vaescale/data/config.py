"""The recipe section of the images. Imports no torch."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from vaescale.config import (
    CODE_MAPS,
    CODE_MASS,
    CODE_MODEL,
    IMAGES,
    SEQUENCE_MODEL,
    SEQUENCES,
    UNBOUNDED_MEAN,
    WHOLE,
    Config,
    Dtype,
    Need,
    Property,
    Size,
    Window,
    parse_bytes,
    sides,
    size_of,
)
from vaescale.data.order import BLOCK_SAMPLES

Crop = Literal["square", "whole", "aspect"] | int
Side = Annotated[int, Field(gt=0)]
Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
MOST_CHANNELS = 16
MOST_FRAMES = 100_000  # of a sequence
MOST_CLIPPED = 0.001  # of the values, by data.range


class VectorMember(NamedTuple):
    """The member of each sample that holds its vector, `json:KEY` or the ending of a NumPy file, and its number of values."""

    name: str
    size: int


class SetConfig(Config):
    """A set of a mixture: its shards, and its weight among all sets."""

    path: str = Field(description="folder or URL of the shards")
    weight: float | None = Field(
        default=None,
        ge=0,
        description="the set's part of the training images, over the sum of all weights; 0: the set is not read; null, of all sets: as "
        "many as the set has",
    )


class BalanceConfig(Config):
    """How often each class of a set is drawn; the weights of sets stay."""

    kind: Literal["class"] = Field(default="class", description="`class`: by the class that the index names")
    power: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="a class of n images is drawn in proportion to n^power: 0 equally, 1 as often as it occurs",
    )


class CropsConfig(Config):
    """Crops of random place and size, resized to image_size."""

    scale: tuple[float, float] = Field(
        default=(0.5, 1.0), description="smallest and largest part of the area"
    )
    aspect: tuple[float, float] = Field(
        default=(0.75, 4 / 3), description="smallest and largest change of width over height"
    )

    @model_validator(mode="after")
    def _are_ranges(self) -> "CropsConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale (={list(self.scale)}) must be two numbers in (0, 1], the smaller first")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect (={list(self.aspect)}) must be two positive numbers, the smaller first")
        return self


class JitterConfig(Config):
    """Largest changes of colours; each image has its own."""

    brightness: float = Field(
        default=0.0, ge=0, le=1, description="factor of all values from 1 - this to 1 + this"
    )
    contrast: float = Field(
        default=0.0, ge=0, le=1, description="factor of the distance from the image's mean grey"
    )
    saturation: float = Field(
        default=0.0, ge=0, le=1, description="factor of the distance from the pixel's grey, of RGB images"
    )
    hue: float = Field(
        default=0.0, ge=0, le=0.5, description="rotation of the colours in turns, either way, of RGB images"
    )


class AugmentConfig(Config):
    """Random changes of training images beyond `flip`. A density then models changed images; evaluation never changes any."""

    shift: int = Field(default=0, ge=0, description="largest shift in pixels, along each side")
    padding: Literal["edge", "zero", "reflect"] = Field(
        default="edge",
        description="what a shift uncovers: the nearest pixel, what the model sees as 0, or the mirrored image",
    )
    crop: CropsConfig | None = Field(default=None, description="crops of random place and size")
    turns: Literal["half", "quarter"] | None = Field(
        default=None,
        description="`half`: turn by 0 or 180 degrees; `quarter`: by 0, 90, 180 or 270, of square images",
    )
    jitter: JitterConfig | None = Field(default=None, description="changes of colours")

    @property
    def words(self) -> str:
        """The changes in words."""
        jitter = {
            name: value for name, value in (self.jitter or JitterConfig()).model_dump().items() if value
        }
        crop = self.crop
        parts = [
            f"shifts of up to {self.shift} pixels ({self.padding})" if self.shift else "",
            f"crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area" if crop else "",
            f"{self.turns} turns" if self.turns else "",
            *(f"{name} by up to {value:g}" for name, value in jitter.items()),
        ]
        return ", ".join(part for part in parts if part)

    @model_validator(mode="after")
    def _changes_something(self) -> "AugmentConfig":
        if not self.words:
            raise ValueError(
                "shift, crop, turns and jitter change nothing; set one of them, or augment to null"
            )
        return self


def _as_sections(value: Any) -> Any:
    """Paths in a list as sections of a path alone, and one section as a list."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list | tuple):
        return [{"path": one} if isinstance(one, str) else one for one in value]
    return value


def _as_balance(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class DataConfig(Config):
    """Where the images are, how they are cut to size and how they are batched."""

    train: Annotated[str | tuple[SetConfig, ...], BeforeValidator(_as_sections)] = Field(
        description="folder or URL of the training shards, or a list of several to mix, [{path: ..., weight: ...}, ...]"
    )
    val: str = Field(description="folder or URL of the held-out shards")
    image_size: Side | tuple[Side, Side] = Field(
        description="side of the images in pixels, or [height, width]"
    )
    holds: Literal["images", "latents", "codes", "sequences"] = Field(
        default="images",
        description="what the shards hold: images, or the latents of another run that `vaescale encode` wrote, as means and "
        "variances from which each step draws, or its codes, of which `vaescale fit-prior` trains a model, or sequences of frames",
    )
    frames: int | None = Field(
        default=None,
        ge=2,
        le=MOST_FRAMES,
        description="frames of a sample, of sequences: of a longer one, training takes as many that follow each other, at a place "
        "drawn anew at each step, and evaluation the first ones",
    )
    channels: int = Field(
        default=1,
        gt=0,
        description="1: grey, 3: RGB, up to 16: as the shards hold them; of latents, their number or the channels of the map; of codes, the number of "
        "different ones",
    )
    dtype: Dtype = Field(
        default="uint8", description="type of the stored values, which the index of the shards states"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="[low, high]: the stored values that become 0 and 1, such as [-1024, 3071]; values outside are clipped; null: the whole range "
        "of an integer type; float32 needs one",
    )
    crop: Literal["square", "whole", "aspect"] | Side | None = Field(
        default=None,
        description="part of the image that is resized to image_size: a number of pixels of the centre square, "
        "`square` for the largest centre square, `aspect` for the largest centre part with the aspect of image_size, `whole`; null: the "
        "images already have that size",
    )
    resample: Filter = Field(default="bicubic", description="filter of the resizing")
    flip: bool = Field(default=False, description="mirror a random half of the training images in each epoch")
    augment: AugmentConfig | None = Field(
        default=None, description="random changes of the training images beyond flips; null: none"
    )
    balance: Annotated[BalanceConfig | None, BeforeValidator(_as_balance)] = Field(
        default=None,
        description="`class` draws the classes of each training set equally often; null: each image equally often",
    )
    global_batch: int = Field(
        gt=0, description="images per optimizer step over all processes; multiples of 16 shuffle best"
    )
    shuffle_block: int = Field(
        default=BLOCK_SAMPLES, gt=0, description="consecutive samples that are shuffled among themselves"
    )
    cache: Literal["memory", "none"] = Field(
        default="none", description="`memory` keeps all decoded images in the memory of each process"
    )
    workers: int = Field(
        default=2, ge=0, le=1024, description="reader processes per rank; unused with cache: memory"
    )
    max_skipped: float = Field(
        default=0.001, ge=0, le=1, description="fraction of unusable images above which training stops"
    )
    cache_dir: str | None = Field(
        default=None, description="folder for remote shards on this node; null: ~/.cache/vaescale/shards"
    )
    cache_bytes: Annotated[int, BeforeValidator(parse_bytes)] = Field(
        default=1 << 37,
        gt=0,
        description="largest size of the remote shards kept on this node, such as 100GB",
    )
    retry_seconds: float = Field(
        default=300.0,
        gt=0,
        description="how long to retry an absent server; keep it below the collectives' timeout",
    )

    _vectors: VectorMember | None = PrivateAttr(default=None)

    @property
    def vectors(self) -> VectorMember | None:
        """The vectors to read with the images, which the recipe's condition names; None: none."""
        return self._vectors

    def with_vectors(self, vectors: VectorMember | None) -> "DataConfig":
        """The same with these vectors."""
        changed = self.model_copy()
        changed._vectors = vectors
        return changed

    @field_validator("image_size")
    @classmethod
    def _a_square_has_one_side(cls, size: Size) -> Size:
        return size_of(*sides(size))

    @property
    def sets(self) -> tuple[SetConfig, ...]:
        """The training sets that are read."""
        if isinstance(self.train, str):
            return (SetConfig(path=self.train),)
        return tuple(one for one in self.train if one.weight != 0)

    @property
    def is_mixed(self) -> bool:
        """Whether several sets are mixed, or classes balanced."""
        return len(self.sets) > 1 or self.balance is not None

    @property
    def train_words(self) -> str:
        """The training sets, to be named in a sentence."""
        return " + ".join(one.path for one in self.sets)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images."""
        return sides(self.image_size)

    @property
    def largest_crop(self) -> Crop:
        """The `crop` that keeps the most of an image without a change of its aspect."""
        return "square" if isinstance(self.image_size, int) else "aspect"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, *self.sides)

    @model_validator(mode="after")
    def _fits_what_the_shards_hold(self) -> "DataConfig":
        if self.holds in ("images", "sequences") and self.channels > MOST_CHANNELS:
            raise ValueError(
                f"channels (={self.channels}) must be at most {MOST_CHANNELS}, or set data.holds=latents"
            )
        if self.holds == "sequences" and self.frames is None:
            raise ValueError(
                "frames is not given, the number of a sample's frames; set it with holds: sequences"
            )
        if self.holds != "sequences" and self.frames is not None:
            raise ValueError(
                f"frames (={self.frames}) needs sequences; leave it out with holds: {self.holds}"
            )
        if not isinstance(self.image_size, int) and (self.crop == "square" or isinstance(self.crop, int)):
            raise ValueError(
                f"crop (={self.crop}) gives squares, image_size is {list(self.image_size)}; set crop to aspect or whole"
            )
        for key in ("crop", "flip", "augment", "balance", "range"):
            if self.holds != "images" and getattr(self, key):
                raise ValueError(
                    f"{key} (={getattr(self, key)}) needs images; leave it out with holds: {self.holds}"
                )
        return self

    @model_validator(mode="after")
    def _the_range_is_one_of_the_type(self) -> "DataConfig":
        whole = WHOLE[self.dtype]
        if self.holds != "images":
            if self.dtype != "uint8":
                raise ValueError(f"dtype (={self.dtype}) needs images; leave it out with holds: {self.holds}")
            return self
        if self.range is None:
            if whole is None:
                raise ValueError(
                    f"range is not given, and {self.dtype} has no usual one; set data.range=[LOW, HIGH], the values that become 0 and 1"
                )
            return self
        low, high = self.range
        if low >= high:
            raise ValueError(f"range (=[{low:g}, {high:g}]) must have its low value first")
        if whole is not None and (low != int(low) or high != int(high)):
            raise ValueError(f"range (=[{low:g}, {high:g}]) must be whole numbers for {self.dtype}")
        if whole is not None and not whole[0] <= low < high <= whole[1]:
            raise ValueError(
                f"range (=[{low:g}, {high:g}]) exceeds {self.dtype}, which holds {whole[0]:g} to {whole[1]:g}"
            )
        return self

    @model_validator(mode="after")
    def _mixes_sets(self) -> "DataConfig":
        if isinstance(self.train, str):
            return self
        number, weights = len(self.train), [one.weight for one in self.train]
        if not number:
            raise ValueError("train is an empty list; name a folder or URL of training shards")
        if twice := sorted({one.path for one in self.train if self._paths.count(one.path) > 1}):
            raise ValueError(f"train names {twice[0]} twice; name each set once, with the sum of the weights")
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(
                f"train has {weights.count(None)} of {number} sets without a weight; give each one a weight, or none"
            )
        if not self.sets:
            raise ValueError(
                f"train has {number} sets whose weights sum to 0; give one of them a weight above 0"
            )
        if self.holds != "images" and len(self.sets) > 1:
            raise ValueError(
                f"train mixes {len(self.sets)} sets, which needs images; name one with holds: {self.holds}"
            )
        return self

    @property
    def window(self) -> Window:
        """The type of the stored values, and those that become 0 and 1."""
        low, high = self.range or WHOLE[self.dtype] or (0.0, 1.0)
        return Window(self.dtype, low, high)

    @property
    def _paths(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else [one.path for one in self.train]

    @model_validator(mode="after")
    def _augments_what_it_holds(self) -> "DataConfig":
        if self.augment is None:
            return self
        height, width = self.sides
        if self.augment.turns == "quarter" and height != width:
            raise ValueError(
                f"augment.turns (='quarter') needs square images, and image_size is {[height, width]}; set it to half"
            )
        if self.augment.shift >= min(height, width):
            raise ValueError(
                f"augment.shift (={self.augment.shift}) moves images of {height}x{width} pixels out of sight; lower it"
            )
        if self.augment.jitter and self.dtype != "uint8":
            raise ValueError(
                f"augment.jitter changes colours of 8-bit pictures, and values of dtype {self.dtype} are measurements; leave it out"
            )
        for name in ("saturation", "hue"):
            if self.channels != 3 and self.augment.jitter and getattr(self.augment.jitter, name):
                raise ValueError(
                    f"augment.jitter.{name} needs RGB images, and channels is {self.channels}; set it to 0"
                )
        return self

    def offers(self) -> frozenset[Property]:
        """The property of images, of codes or of sequences."""
        offered = {"images": IMAGES, "codes": CODE_MAPS, "sequences": SEQUENCES}
        return frozenset({offered[self.holds]} if self.holds in offered else ())

    def needs(self) -> Iterable[Need]:
        """Latents have values outside of [0, 1]; codes and sequences have models of their own."""
        if self.holds == "sequences":
            yield Need("data.holds (='sequences')", SEQUENCE_MODEL, "set network.kind=svg")
        if self.holds == "codes":
            yield Need("data.holds (='codes')", CODE_MODEL, "set network.kind=code_transformer")
            yield Need("data.holds (='codes')", CODE_MASS, "set likelihood.kind=categorical")
        if self.holds == "latents":
            remedy = "set likelihood.mean=identity, with likelihood.kind gaussian, laplace or student_t"
            yield Need("data.holds (='latents')", UNBOUNDED_MEAN, remedy)
