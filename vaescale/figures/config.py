"""The recipe section of pictures, and how images of any depth and number of channels are shown. Imports no torch."""

from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vaescale.config import Config, Sizes, Window

Channel = Annotated[int, Field(ge=1)]
Colours = Literal["gray", "viridis", "magma", "inferno", "cividis", "turbo"]
OWN_SCALES = (
    ", 0 to ",
    "sigma to ",
)  # in names of rows that are divided by their own maximum, such as `|error|, 0 to 0.2`


class FiguresConfig(Config):
    """What pictures of images show. It changes no number."""

    channels: tuple[Channel] | tuple[Channel, Channel, Channel] | None = Field(
        default=None,
        description="one channel, or three as red, green and blue, counted from 1, such as [3, 2, 1]; null: the first of 1 or 2, the first three "
        "of more",
    )
    colours: Colours = Field(default="gray", description="colour map of one channel")

    def check_sizes(self, sizes: Sizes) -> None:
        """Refuse channels that images do not have."""
        if self.channels is not None and max(self.channels) > sizes.channels:
            raise ValueError(
                f"figures.channels (={list(self.channels)}) names channel {max(self.channels)}, data.channels is {sizes.channels}"
            )

    @model_validator(mode="after")
    def _a_map_is_of_one_channel(self) -> "FiguresConfig":
        if self.colours != "gray" and self.channels is not None and len(self.channels) == 3:
            raise ValueError(
                f"colours (={self.colours}) is for one channel, channels is {list(self.channels)}; name one of them"
            )
        return self

    def view(self, channels: int, window: Window) -> "View":
        """How images of so many channels are shown. window: the stored values that are 0 and 1."""
        usual = (1,) if channels < 3 or self.colours != "gray" else (1, 2, 3)
        chosen = self.channels or usual
        return View(channels, tuple(number - 1 for number in chosen), self.colours, window)


class View(NamedTuple):
    """How images are shown. channels: of the images; shown: the numbers of one or three of them, from 0; colours: the map of one."""

    channels: int = 1
    shown: tuple[int, ...] = (0,)
    colours: Colours = "gray"
    window: Window = Window()

    @property
    def has_bar(self) -> bool:
        """Whether a bar says which stored value each colour is: of one channel, unless it is grey of 8 bits."""
        return len(self.shown) == 1 and (self.colours != "gray" or self.window != Window())

    def label(self) -> str:
        """What the bar shows."""
        kind = f"{self.window.dtype} value"
        return f"{kind} of channel {self.shown[0] + 1}" if self.channels > 1 else kind

    def of(self, images: NDArray[np.float32], name: str = "") -> NDArray[np.float32]:
        """Images [N, C, H, W] in [0, 1] as grey [N, 1, H, W] or colours [N, 3, H, W]. name: of their row, which may have a scale of its own."""
        if images.shape[1] == self.channels and self.shown != tuple(range(self.channels)):
            images = images[:, list(self.shown)]
        if self.colours == "gray" or images.shape[1] != 1 or any(each in name for each in OWN_SCALES):
            return images
        coloured: NDArray[np.float32] = np.moveaxis(self.map(images[:, 0]), -1, 1)
        return coloured

    def map(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The colours [..., 3] of values in [0, 1]."""
        return _coloured(values, self.colours)

    def bar(self) -> "Bar | None":
        """The bar that says which stored value each colour is, if there is one."""
        return Bar(self.colours, self.window.low, self.window.high, self.label()) if self.has_bar else None


class Scale(NamedTuple):
    """Colours of the rows of one name, which hold other numbers than images do: from 0 to `largest`, and white where there is none."""

    name: str
    largest: float
    label: str
    colours: Colours = "viridis"

    def of(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The colours [N, 3, H, W] of values [N, 1, H, W], NaN for none."""
        coloured = _coloured(values[:, 0] / max(self.largest, 1e-12), self.colours)
        coloured[np.isnan(values[:, 0])] = 1.0
        return np.moveaxis(coloured, -1, 1)

    def bar(self) -> "Bar":
        """The bar that says which number each colour is."""
        return Bar(self.colours, 0.0, self.largest, self.label)


class Bar(NamedTuple):
    """A labelled scale of colours from `low` to `high`."""

    colours: Colours
    low: float
    high: float
    label: str

    def strip(self, places: int) -> NDArray[np.float32]:
        """Its colours, [places, 3]."""
        return _coloured(np.linspace(0, 1, places, dtype=np.float32), self.colours)

    @property
    def text(self) -> str:
        """Both ends and the label in a line."""
        return f"{number_text(self.low)} to {number_text(self.high)}, {self.label}"


def number_text(number: float) -> str:
    """A number at a scale of colours: levels of deep images in full, fractions to three digits."""
    return f"{number:.3g}" if abs(number) < 1 else f"{number:g}"


def _coloured(values: NDArray[np.float32], colours: Colours) -> NDArray[np.float32]:
    """The colours [..., 3] of values in [0, 1]."""
    from matplotlib import colormaps

    coloured: NDArray[np.float32] = colormaps[colours](np.clip(values, 0, 1))[..., :3]
    return coloured.astype(np.float32)
