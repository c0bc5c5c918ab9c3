"""Recipe section of the perceptual term. Imports no torch."""

from collections.abc import Iterable

from pydantic import Field, model_validator

from vaescale.config import DECODED_MEAN, UNCOMPILED, Config, Need, Sizes

PROGRAM = ".pt2"


class PerceptualConfig(Config):
    """A loss term: the distance of image and decoded mean in the maps of a frozen network (LPIPS of Zhang et al. 2018)."""

    features: str = Field(
        min_length=1,
        description="an LPIPS network as FILE.safetensors, the folder of a classifier that `train-features` wrote, or FILE.pt2, an "
        "exported program",
    )
    weight: float = Field(default=1.0, ge=0, description="nats of a distance of 1; 0: it is not computed")
    start_step: int = Field(default=0, ge=0, description="the first step with the term")
    repeat_channels: bool = Field(
        default=False, description="show grey images three times to a network of colour images"
    )
    layers: tuple[str, ...] | None = Field(
        default=None,
        description="names of the maps of FILE.pt2 that are compared; null: all; the other kinds have their own",
    )
    trusted: bool = Field(
        default=False, description="let FILE.pt2 run: it is a program and could do anything"
    )

    @model_validator(mode="after")
    def _a_program_is_trusted(self) -> "PerceptualConfig":
        if self.features.endswith(PROGRAM) and not self.trusted:
            raise ValueError(
                f"features (={self.features}) is a program and could do anything; if you trust its author, set trusted to true"
            )
        if not self.features.endswith(PROGRAM) and (self.layers is not None or self.trusted):
            raise ValueError(
                f"layers and trusted are for programs ({PROGRAM}), and features (={self.features}) is none; leave them out"
            )
        if self.layers is not None and len(set(self.layers)) != max(1, len(self.layers)):
            raise ValueError(f"layers (={list(self.layers)}) must be different names, at least one")
        return self

    def needs_for(self, key: str) -> Iterable[Need]:
        """The needs of a term that reads the decoded mean. key: the section's."""
        yield Need(key, UNCOMPILED, "set training.compile to false")
        yield Need(key, DECODED_MEAN, "choose another likelihood.kind")

    def check_start(self, key: str, sizes: Sizes) -> None:
        """Raise ValueError where the term never comes."""
        if self.start_step >= sizes.steps:
            raise ValueError(
                f"{key}.start_step (={self.start_step}) is not below training.steps (={sizes.steps}); lower it, or leave the section out"
            )
