"""Images in rows and panels. Legend: images [N, C, H, W] in [0, 1], N read row by row."""

import math
from collections.abc import Sequence
from pathlib import Path

from vaescale.figures.drawing import CELL_INCHES, Images, finish, montage, show, subplots


def reconstructions(path: Path, originals: Images, means: Images, *, title: str, columns: int = 12) -> None:
    """Pairs of rows: originals above, decoded means below."""
    rows: list[tuple[str, Images]] = []
    for start in range(0, len(originals), columns):
        rows += [
            ("original", originals[start : start + columns]),
            ("decoded", means[start : start + columns]),
        ]
    image_rows(path, rows, title=title)


def image_rows(path: Path, rows: Sequence[tuple[str, Images]], *, title: str) -> None:
    """One named row of images under another."""
    columns = max(len(images) for _, images in rows)
    size = (CELL_INCHES * columns + 1.1, CELL_INCHES * len(rows) + 0.5)
    figure, axes = subplots(len(rows), columns, size)
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for cell, image in zip(line, images, strict=False):
            show(cell, image)
    finish(figure, path, title)


def sample_panels(path: Path, panels: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Named panels of samples, each as square as can be, two beside each other."""
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


def image_map(path: Path, images: Images, *, title: str) -> None:
    """A square of images without gaps."""
    side = math.isqrt(len(images))
    inches = min(12.0, max(5.0, 0.4 * side))
    figure, axes = subplots(1, 1, (inches, inches + 0.4))
    show(axes[0, 0], montage(images, side, gap=0))
    finish(figure, path, title)


def image_strips(path: Path, rows: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Named rows of equally many images, close together: for tables of pictures."""
    count = max(len(images) for _, images in rows)
    figure, axes = subplots(len(rows), 1, (0.36 * count + 1.6, 0.38 * len(rows) + 0.5), dpi=85)
    for (name, images), axis in zip(rows, axes[:, 0], strict=True):
        show(axis, montage(images, count))
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=7)
    finish(figure, path, title)
