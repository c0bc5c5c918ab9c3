"""Images in rows and panels. Legend: images [N, C, H, W] in [0, 1], N read row by row."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vaescale.figures.drawing import CELL_INCHES, Images, finish, montage, show, subplots
from vaescale.system.files import write_whole

SMALLEST_PIXELS = 64  # minimum side of an image in the figure
MOST_TICKS = 11


def image_rows(path: Path, rows: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Draw named rows of images of one size, one below another."""
    columns = max(len(images) for _, images in rows)
    gap = max(1, round(rows[0][1].shape[2] / 14))
    size = (CELL_INCHES * columns + 1.1, CELL_INCHES * len(rows) + 0.5)
    _draw_rows(path, rows, columns=columns, gap=gap, size=size, letters=8, dpi=130, title=title)


def sample_panels(path: Path, panels: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Draw named panels of samples in two columns, each panel nearly square."""
    count = len(panels[0][1])
    columns = max(8, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    size = (
        2 * columns * CELL_INCHES * 0.75 + 0.6,
        math.ceil(len(panels) / 2) * (rows * CELL_INCHES * 0.75 + 0.4) + 0.4,
    )
    figure, axes = subplots(math.ceil(len(panels) / 2), 2, size)
    for cell, (name, images) in zip(axes.flat, panels, strict=False):
        show(cell, montage(images, columns))
        cell.set_title(name, fontsize=9)
    finish(figure, path, title)


def image_map(path: Path, images: Images, *, values: Sequence[float], title: str) -> None:
    """Draw a square of images without gaps over the plane of z_1 and z_2.

    values: z_1 from left to right, and z_2 from bottom to top.
    """
    side = len(values)
    inches = min(12.0, max(5.0, 0.4 * side))
    figure, axes = subplots(1, 1, (inches + 0.4, inches + 0.6), frame=True)
    axis = axes[0, 0]
    show(axis, montage(images, side, gap=0))
    height, width = images.shape[2:]
    shown = range(0, side, math.ceil(side / MOST_TICKS))
    ticks = [f"{values[number]:.2g}" for number in shown]
    axis.set_xticks([(number + 0.5) * width - 0.5 for number in shown], ticks)
    axis.set_yticks([(side - number - 0.5) * height - 0.5 for number in shown], ticks)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("z_1", fontsize=9)
    axis.set_ylabel("z_2", fontsize=9)
    finish(figure, path, title)


def picture_rows(path: Path, rows: Sequence[tuple[str, Images]]) -> None:
    """Draw named rows of equally many images, enlarged. It is fast enough to run during training."""
    from PIL import Image, ImageDraw

    images = [row for _, row in rows]
    whole = montage(np.concatenate(images), len(images[0]))
    levels = (255 * np.moveaxis(whole, 0, -1)).round().astype(np.uint8)
    scale = max(1, SMALLEST_PIXELS // images[0].shape[-1])
    picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    margin = 6 * (2 + max(len(name) for name, _ in rows))  # letters are 6 pixels wide
    height = picture.height / len(rows)
    named = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
    named.paste(picture, (margin, 0))
    for number, (name, _) in enumerate(rows):
        anchor_point = (margin - 6, int((number + 0.5) * height))
        ImageDraw.Draw(named).text(anchor_point, name, fill="black", anchor="rm", font_size=11)
    content = io.BytesIO()
    named.save(content, format="png")
    write_whole(path, content.getvalue())


def image_strips(path: Path, rows: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Draw named rows of equally many images with small gaps, as a table of pictures."""
    count = max(len(images) for _, images in rows)
    names = max(1.6, 0.075 * max(len(name) for name, _ in rows))
    size = (0.36 * count + names, 0.38 * len(rows) + 0.5)
    _draw_rows(
        path,
        rows,
        columns=count,
        gap=max(1, round(rows[0][1].shape[2] / 30)),
        size=size,
        letters=7,
        dpi=85,
        title=title,
    )


def _draw_rows(
    path: Path,
    rows: Sequence[tuple[str, Images]],
    *,
    columns: int,
    gap: int,
    size: tuple[float, float],
    letters: int,
    dpi: int,
    title: str,
) -> None:
    """Draw all rows as one picture on one axis: 4 rows of 12 images took 0.66 s with an axis for each image, and 0.18 s so.

    gap: white pixels between images. size: in inches. letters: size of the names, in points.
    """
    channels = max(images.shape[1] for _, images in rows)
    height, width = rows[0][1].shape[2:]
    cells = np.ones((len(rows) * columns, channels, height, width), np.float32)
    for number, (_, images) in enumerate(rows):
        cells[number * columns :][: len(images)] = images
    figure, axes = subplots(1, 1, size, dpi=dpi)
    show(axes[0, 0], montage(cells, columns, gap))
    for number, (name, _) in enumerate(rows):
        middle = number * (height + gap) + (height - 1) / 2
        axes[0, 0].text(-1.5 * gap, middle, name, ha="right", va="center", fontsize=letters)
    finish(figure, path, title)
