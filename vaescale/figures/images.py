"""Images in rows and panels. Legend: images [N, C, H, W] in [0, 1], N read row by row."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaescale.figures.config import Bar, Scale, View
from vaescale.figures.drawing import (
    CELL_INCHES,
    LABEL_POINTS,
    TICK_POINTS,
    TITLE_INCHES,
    Images,
    finish,
    montage,
    show,
    subplots,
    text_inches,
    wrapped,
)
from vaescale.system.files import write_whole

SMALLEST_PIXELS = 64  # minimum side of an image in the figure
MOST_TICKS = 11
LINE_INCHES = 0.17  # of each further line of a title
LETTER_PIXELS = 13  # in pictures that are drawn during training
USUAL = View()


def image_rows(path: Path, rows: Sequence[tuple[str, Images]], *, title: str, view: View = USUAL) -> None:
    """Draw named rows of images of one size, one below another."""
    _draw_rows(path, rows, gap=max(1, round(rows[0][1].shape[2] / 14)), title=title, view=view)


def sample_panels(
    path: Path, panels: Sequence[tuple[str, Images]], *, title: str, view: View = USUAL
) -> None:
    """Draw named panels of samples in two columns, each panel nearly square."""
    panels = [(name, view.of(images)) for name, images in panels]
    count, _, height, width = panels[0][1].shape
    most = math.ceil(math.sqrt(max(64, count) * height / width))
    columns = next(
        (n for n in range(most, most // 2, -1) if count % n == 0), most
    )  # full rows, if there are any
    rows = math.ceil(count / columns)
    high, wide = (0.75 * CELL_INCHES * side / max(height, width) for side in (height, width))
    size = (2 * columns * wide + 0.6, math.ceil(len(panels) / 2) * (rows * high + 0.4) + 0.4)
    figure, axes = subplots(math.ceil(len(panels) / 2), 2, size)
    for cell, (name, images) in zip(axes.flat, panels, strict=False):
        show(cell, montage(images, columns))
        cell.set_title(name, fontsize=9)
    finish(figure, path, title, view)


def image_map(path: Path, images: Images, *, values: Sequence[float], title: str, view: View = USUAL) -> None:
    """Draw a square of images without gaps over the plane of z_1 and z_2.

    values: z_1 from left to right, and z_2 from bottom to top.
    """
    side = len(values)
    height, width = images.shape[2:]
    inches = min(12.0, max(5.0, 0.4 * side)) / max(height, width)
    figure, axes = subplots(1, 1, (width * inches + 0.4, height * inches + 0.6), frame=True)
    axis = axes[0, 0]
    show(axis, montage(view.of(images), side, gap=0))
    shown = range(0, side, math.ceil(side / MOST_TICKS))
    ticks = [f"{values[number]:.2g}" for number in shown]
    axis.set_xticks([(number + 0.5) * width - 0.5 for number in shown], ticks)
    axis.set_yticks([(side - number - 0.5) * height - 0.5 for number in shown], ticks)
    axis.tick_params(labelsize=TICK_POINTS)
    axis.set_xlabel("z_1", fontsize=9)
    axis.set_ylabel("z_2", fontsize=9)
    finish(figure, path, title, view)


def picture_rows(path: Path, rows: Sequence[tuple[str, Images]], *, title: str, view: View = USUAL) -> None:
    """Draw named rows of equally many images, enlarged, below a title. It is fast enough to run during training."""
    from PIL import Image, ImageDraw, ImageFont

    images = [view.of(row, name) for name, row in rows]
    channels = max(row.shape[1] for row in images)
    images = [np.broadcast_to(row, (len(row), channels, *row.shape[2:])) for row in images]
    whole = montage(np.concatenate(images), len(images[0]))
    levels = (255 * np.moveaxis(whole, 0, -1)).round().astype(np.uint8)
    scale = max(1, SMALLEST_PIXELS // min(images[0].shape[2:]))
    picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    font, pad = ImageFont.load_default(LETTER_PIXELS), LETTER_PIXELS // 2
    left = 2 * pad + math.ceil(max(font.getlength(name) for name, _ in rows))
    width = left + picture.width + pad
    lines = _fitting_lines(title, width - 2 * pad, font.getlength)
    top = pad + round(1.4 * LETTER_PIXELS) * len(lines)
    named = Image.new(picture.mode, (width, top + picture.height + pad), "white")
    named.paste(picture, (left, top))
    draw = ImageDraw.Draw(named)
    for number, line in enumerate(lines):
        middle = top * (number + 0.5) / len(lines)
        draw.text((width / 2, middle), line, fill="black", anchor="mm", font=font)
    height = picture.height / len(rows)
    for number, (name, _) in enumerate(rows):
        draw.text((left - pad, top + (number + 0.5) * height), name, fill="black", anchor="rm", font=font)
    if bar := view.bar():
        named = with_bar(named, bar, font)
    content = io.BytesIO()
    named.save(content, format="png")
    write_whole(path, content.getvalue())


def with_bar(picture: Any, bar: Bar, font: Any) -> Any:
    """A picture with a bar below that says which number each colour is."""
    from PIL import Image, ImageDraw

    wider = Image.new(picture.mode, (picture.width, picture.height + 3 * LETTER_PIXELS), "white")
    wider.paste(picture, (0, 0))
    length = picture.width // 2
    levels = (255 * bar.strip(length)).round().astype(np.uint8)
    drawn = Image.fromarray(np.repeat(levels[None], LETTER_PIXELS, axis=0)).convert(picture.mode)
    left, top = picture.width // 4, picture.height
    wider.paste(drawn, (left, top))
    draw = ImageDraw.Draw(wider)
    below = top + 1.8 * LETTER_PIXELS
    draw.text((picture.width / 2, below), bar.text, fill="black", anchor="mm", font=font)
    return wider


def _fitting_lines(text: str, most: float, measure: Callable[[str], float]) -> list[str]:
    """A text in lines of at most `most` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= most:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def image_strips(
    path: Path,
    rows: Sequence[tuple[str, Images]],
    *,
    title: str,
    view: View = USUAL,
    scale: Scale | None = None,
) -> None:
    """Draw named rows of equally many images with small gaps, as a table of pictures. scale: of the rows of its name."""
    _draw_rows(path, rows, gap=max(1, round(rows[0][1].shape[2] / 30)), title=title, view=view, scale=scale)


def coloured(images: Images, name: str, view: View, scale: Scale | None) -> Images:
    """A row's images [N, C, H, W] as grey or as colours."""
    return scale.of(images) if scale and name == scale.name else view.of(images, name)


def _draw_rows(
    path: Path,
    rows: Sequence[tuple[str, Images]],
    *,
    gap: int,
    title: str,
    view: View,
    scale: Scale | None = None,
) -> None:
    """Draw all rows as one picture on one axis: 4 rows of 12 images took 0.66 s with an axis for each image, and 0.18 s so.

    gap: white pixels between images. The figure has the size that names and images need.
    """
    rows = [(name, coloured(images, name, view, scale)) for name, images in rows]
    columns = max(len(images) for _, images in rows)
    channels = max(images.shape[1] for _, images in rows)
    height, width = rows[0][1].shape[2:]
    cells = np.ones((len(rows) * columns, channels, height, width), np.float32)
    for number, (_, images) in enumerate(rows):
        cells[number * columns :][: len(images)] = images
    canvas = montage(cells, columns, gap)
    inches = CELL_INCHES / max(height, width)  # of a pixel
    names = text_inches([name for name, _ in rows], LABEL_POINTS) + 0.2
    size = (canvas.shape[2] * inches + names + 0.08, canvas.shape[1] * inches + 0.08)
    lines = wrapped(title, size[0]).count("\n")
    size = (size[0], size[1] + TITLE_INCHES + lines * LINE_INCHES)
    figure, axes = subplots(1, 1, size, margins=(names, 0.08, 0.08, lines * LINE_INCHES))
    show(axes[0, 0], canvas)
    for number, (name, _) in enumerate(rows):
        middle = number * (height + gap) + (height - 1) / 2
        axes[0, 0].text(-0.08 / inches, middle, name, ha="right", va="center", fontsize=LABEL_POINTS)
    finish(figure, path, title, view, scale)
