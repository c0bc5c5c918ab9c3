"""The figure of `vaescale quality`: distances of samples from images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaescale.figures.drawing import LABEL_POINTS, POINT_COLOURS, TICK_POINTS, finish, log_ticks, subplots

LEAST_DISTANCE = 1e-12
ROW_INCHES = 0.3


def quality(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw the Frechet distance of each row on a logarithmic scale and, in the same line, its precision and recall.

    Rows of one kind of picture have one colour. rows: `of`, `decode`, `frechet`, `precision` and `recall`.
    """
    figure, axes = subplots(1, 2, (11.0, max(3.2, ROW_INCHES * len(rows) + 1.7)), frame=True)
    distance, shares = axes[0]
    sources = list(dict.fromkeys(row["of"] for row in rows))
    colours = [POINT_COLOURS[sources.index(row["of"]) % len(POINT_COLOURS)] for row in rows]
    _draw_distances(distance, [max(row["frechet"], LEAST_DISTANCE) for row in rows], colours)
    _draw_shares(shares, rows, colours)
    decodings = [row["decode"] or "mean" for row in rows]
    labels = [
        f"{row['of']}{'' if decode == 'mean' else ', ' + decode}"
        for row, decode in zip(rows, decodings, strict=True)
    ]
    for axis in (distance, shares):
        axis.set_yticks(range(len(rows)), labels if axis is distance else [""] * len(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(axis="y", labelsize=LABEL_POINTS, length=0)
        axis.tick_params(axis="x", labelsize=TICK_POINTS)
        axis.grid(alpha=0.25)
    finish(figure, path, title)


def _draw_distances(axis: Any, values: Sequence[float], colours: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axis.set_xscale("log")
    low, high = min(values) / 1.4, max(values) * 1.4
    low, high = low, high * (high / low) ** 0.12  # the last number's room
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for number, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axis.plot([value], [number], "o", color=colour, markersize=8)
        axis.annotate(
            f"{value:.3g}",
            (value, number),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_POINTS,
        )
    axis.set_xlabel("Frechet distance (lower is better; log scale)", fontsize=LABEL_POINTS)


def _draw_shares(axis: Any, rows: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> None:
    """Draw precision as a filled and recall as an open marker, joined by a line: its length is what one costs the other."""
    least = min(min(row["precision"], row["recall"]) for row in rows)
    for number, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        ends = [row["precision"], row["recall"]]
        axis.plot(ends, [number, number], "-", color=colour, linewidth=1.2, alpha=0.6)
        axis.plot(ends[:1], [number], "o", color=colour, markersize=8)
        axis.plot(
            ends[1:], [number], "s", color=colour, markersize=7, markerfacecolor="white", markeredgewidth=1.6
        )
    for marker, face, label in (
        ("o", "0.3", "precision: samples that look like images"),
        ("s", "white", "recall: images that samples reach"),
    ):
        axis.plot([], [], marker, color="0.3", markerfacecolor=face, linestyle="none", label=label)
    room = 0.05 * (1 - least) + 0.01
    axis.set_xlim(max(least - room, -0.02), 1 + room)
    axis.set_xlabel("share of the pictures (higher is better)", fontsize=LABEL_POINTS)
    axis.legend(fontsize=LABEL_POINTS, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=1)
