"""The recipe section of the images. Imports no torch."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vaescale.config import (
    CODE_MAPS,
    CODE_MASS,
    CODE_MODEL,
    UNBOUNDED_MEAN,
    Config,
    Need,
    Property,
    Size,
    parse_bytes,
    sides,
    size_of,
)
from vaescale.data.plan import BLOCK_SAMPLES

Crop = Literal["square", "whole", "aspect"] | int
Side = Annotated[int, Field(gt=0)]
Filter = Literal["box", "bilinear", "bicubic", "lanczos"]


class DataConfig(Config):
    """Where the images are, how they are cut to size and how they are batched."""

    train: str = Field(description="folder or URL of the training shards")
    val: str = Field(description="folder or URL of the held-out shards")
    image_size: Side | tuple[Side, Side] = Field(
        description="side of the images in pixels, or [height, width]"
    )
    holds: Literal["images", "latents", "codes"] = Field(
        default="images",
        description="what the shards hold: images, or the latents of another run that `vaescale encode` wrote, as means and "
        "variances from which each step draws, or its codes, of which `vaescale fit-prior` trains a model",
    )
    channels: int = Field(
        default=1,
        gt=0,
        description="1: grey, 3: RGB; of latents, their number or the channels of the map; of codes, the number of different ones",
    )
    crop: Literal["square", "whole", "aspect"] | Side | None = Field(
        default=None,
        description="part of the image that is resized to image_size: a number of pixels of the centre square, "
        "`square` for the largest centre square, `aspect` for the largest centre part with the aspect of image_size, `whole`; null: the "
        "images already have that size",
    )
    resample: Filter = Field(default="bicubic", description="filter of the resizing")
    flip: bool = Field(default=False, description="mirror a random half of the training images in each epoch")
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

    @field_validator("image_size")
    @classmethod
    def _a_square_has_one_side(cls, size: Size) -> Size:
        return size_of(*sides(size))

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
        if self.holds == "images" and self.channels not in (1, 3):
            raise ValueError(f"channels (={self.channels}) must be 1 or 3, or set data.holds=latents")
        if not isinstance(self.image_size, int) and (self.crop == "square" or isinstance(self.crop, int)):
            raise ValueError(
                f"crop (={self.crop}) gives squares, image_size is {list(self.image_size)}; set crop to aspect or whole"
            )
        for key in ("crop", "flip"):
            if self.holds != "images" and getattr(self, key):
                raise ValueError(
                    f"{key} (={getattr(self, key)}) needs images; leave it out with holds: {self.holds}"
                )
        return self

    def offers(self) -> frozenset[Property]:
        """The property of models of codes."""
        return frozenset({CODE_MAPS}) if self.holds == "codes" else frozenset()

    def needs(self) -> Iterable[Need]:
        """Latents have values outside of [0, 1]; codes have a model of their own."""
        if self.holds == "codes":
            yield Need("data.holds (='codes')", CODE_MODEL, "set network.kind=code_transformer")
            yield Need("data.holds (='codes')", CODE_MASS, "set likelihood.kind=categorical")
        if self.holds == "latents":
            remedy = "set likelihood.mean=identity, with likelihood.kind gaussian, laplace or student_t"
            yield Need("data.holds (='latents')", UNBOUNDED_MEAN, remedy)
