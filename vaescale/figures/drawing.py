"""Shared functions of all figures: canvases without a display, colours, images and file output.

Legend: images [N, C, H, W] in [0, 1].
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.config import Bar, Scale, View, number_text
from vaescale.system.files import write_whole

Images = NDArray[np.float32]
CELL_INCHES, TITLE_INCHES, BAR_INCHES = 0.62, 0.25, 0.6
TITLE_GAP_INCHES = 0.06  # above a title
TITLE_POINTS, LABEL_POINTS, TICK_POINTS = 10, 9, 8
POINTS_PER_INCH = 72
MOST_LOG_TICKS = 12
# The first seven are from Okabe & Ito's palette: distinct for the colour-blind. Some look alike in grey, so markers and lines
# differ too. Eleven colours, five markers and four lines have no common divisor: their pairs repeat late.
COLOURS = ("#0072B2", "#D55E00")
POINT_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#7B3FA0", "#7A4A1E", "#8A8D00", "#7F7F7F"),
)
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

    margins: of each axis to the left, right, bottom and top, in inches; a title of one line is above. Without them, matplotlib
    measures all texts twice and makes room for them, which doubles the time of a figure.
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


def finish(
    figure: Any,
    path: Path,
    title: str,
    view: View = View(),  # noqa: B008  # a NamedTuple is frozen
    scale: Scale | None = None,
) -> None:
    """Add the title, on as many lines as the figure's width asks for, and write the figure as PNG. view, scale: for bars of colours."""
    # matplotlib's place is a share of the height, which in a high figure is below the room for a title.
    place = {} if figure.get_layout_engine() else {"y": 1 - TITLE_GAP_INCHES / figure.get_figheight()}
    figure.suptitle(wrapped(title, figure.get_figwidth()), fontsize=TITLE_POINTS, **place)
    view_bar = view.bar()
    if view_bar:
        middle = (view.window.low + view.window.high) / 2
        middle = middle if view.window.levels is None else math.floor(middle)
        _add_bar(figure, view_bar, [view.window.low, middle, view.window.high])
    if scale:
        _add_bar(figure, scale.bar(), [0.0, scale.largest / 2, scale.largest])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(path, picture.getvalue())


def _add_bar(figure: Any, bar: Bar, ticks: Sequence[float]) -> None:
    """Make the figure higher by BAR_INCHES, with a bar below that says which number each colour is."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # the places of its axes are decided now
        figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    higher = height + BAR_INCHES
    for axis in figure.axes:
        place = axis.get_position()
        axis.set_position(
            (place.x0, (place.y0 * height + BAR_INCHES) / higher, place.width, place.height * height / higher)
        )
    figure.set_size_inches(width, higher)
    for text in figure.texts:  # the title
        text.set_y((text.get_position()[1] * height + BAR_INCHES) / higher)
    inches = min(2.5, 0.7 * width)
    axis = figure.add_axes((0.5 - inches / width / 2, 0.33 / higher, inches / width, 0.1 / higher))
    axis.imshow(
        bar.strip(256)[None],
        extent=(bar.low, bar.high, 0, 1),
        aspect="auto",
    )
    axis.set_xticks(ticks, [number_text(tick) for tick in ticks])
    axis.set_yticks([])
    axis.tick_params(labelsize=TICK_POINTS, pad=1)
    axis.set_title(bar.label, fontsize=TICK_POINTS, pad=2)


def wrapped(title: str, inches: float) -> str:
    """A title with line breaks, so that no line is wider than a figure of so many inches."""
    width = text_inches([title], TITLE_POINTS)
    if width <= inches - 0.1:
        return title
    return "\n".join(textwrap.wrap(title, max(12, int(len(title) * (inches - 0.1) / width * 0.95))))


def text_inches(texts: Sequence[str], points: float) -> float:
    """The width of the widest line of texts in inches, in letters of so many points."""
    from matplotlib.textpath import TextPath

    lines = [plain(line) for text in texts for line in text.splitlines() if line.strip()]
    widths = [TextPath((0, 0), line, size=points).get_extents().width for line in lines]
    return float(max(widths, default=0.0)) / POINTS_PER_INCH


def plain(text: str) -> str:
    """A text in which matplotlib sees no formula: dollar signs are letters."""
    return text.replace("$", r"\$")


def logarithmic(axis: Any, values: Sequence[float]) -> bool:
    """Make the y axis logarithmic, with plain numbers: as many as the range of the values leaves room for.

    Returns whether it is: values of which none is above 0 have no such axis.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    shown = [value for value in values if 0 < value < math.inf]
    if not shown:
        return False
    axis.set_yscale("log")
    low, high = min(shown), max(shown)
    margin = max(high / low, 1.01) ** 0.05
    low, high = low / margin, high * margin
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    return True


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high > 0 for a logarithmic axis: powers of ten, or more of them where these are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside[:: math.ceil(len(inside) / MOST_LOG_TICKS)]
    return [float(f"{value:.2g}") for value in np.linspace(low, high, 5)[1:-1]]
