"""Shared functions of all figures: canvases without a display, colours, images and file output.

Legend: images [N, C, H, W] in [0, 1].
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.system.files import write_whole

Images = NDArray[np.float32]
CELL_INCHES, TITLE_INCHES = 0.62, 0.25
# From Okabe & Ito's palette: distinct for the colour-blind. Some look alike in grey, so markers and lines differ too.
COLOURS = ("#0072B2", "#D55E00")
POINT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
STYLES = ("-", "--", ":", "-.")
DISTINCT = len(POINT_COLOURS) * len(MARKERS)


def subplots(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    frame: bool = False,
    dpi: int = 130,
    margins: tuple[float, float, float, float] | None = None,
) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]. size: in inches. frame: whether to draw ticks and lines.

    margins: of each axis to the left, right, bottom and top, in inches. Without them, matplotlib measures all texts twice and
    makes room for them, which doubles the time of a figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained" if margins is None else None)
    FigureCanvasAgg(figure)
    places = {} if margins is None else _places(rows, columns, size, margins)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=places)
    if not frame:
        for axis in axes.flat:
            axis.set_axis_off()
    return figure, axes


def _places(
    rows: int, columns: int, size: tuple[float, float], margins: tuple[float, float, float, float]
) -> dict[str, float]:
    """The axes' places as matplotlib's GridSpec wants them: fractions of the figure, and gaps as fractions of an axis."""
    left, right, bottom, top = margins
    width, height = size[0] / columns - left - right, (size[1] - TITLE_INCHES) / rows - bottom - top
    return {
        "left": left / size[0],
        "right": 1 - right / size[0],
        "bottom": bottom / size[1],
        "top": 1 - (TITLE_INCHES + top) / size[1],
        "wspace": (left + right) / width,
        "hspace": (bottom + top) / height,
    }


def look(number: int) -> tuple[str, str]:
    """The colour and the marker for series `number`, distinct for the first series."""
    return POINT_COLOURS[number % len(POINT_COLOURS)], MARKERS[number % len(MARKERS)]


def show(axis: Any, image: Images) -> None:
    """Draw one image on an axis, in grey or in colours."""
    picture = np.clip(np.moveaxis(image, 0, -1), 0, 1)
    axis.imshow(picture[:, :, 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1)


def montage(images: Images, columns: int, gap: int = 1) -> Images:
    """Tile [N, C, H, W] to one image [C, rows*(H+gap)-gap, columns*(W+gap)-gap], with white gaps."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = np.ones((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), dtype=np.float32)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def finish(figure: Any, path: Path, title: str) -> None:
    """Add the title and write the figure as PNG."""
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(path, picture.getvalue())


def logarithmic(axis: Any) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
