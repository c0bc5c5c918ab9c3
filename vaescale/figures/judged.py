"""How far samples are from images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaescale.figures.drawing import MARKERS, POINT_COLOURS, finish, subplots


def quality(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]], *, title: str) -> None:
    """The Frechet distance of each row as a point on a logarithmic scale, and precision over recall. rows: a label, and
    `frechet`, `precision` and `recall`.
    """
    figure, axes = subplots(1, 2, (9.6, max(3.2, 0.3 * len(rows) + 1.4)), frame=True)
    distance, shares = axes[0]
    for number, (label, row) in enumerate(rows):
        colour = POINT_COLOURS[number % len(POINT_COLOURS)]
        marker = MARKERS[number // len(POINT_COLOURS) % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none"}
        distance.plot([max(row["frechet"], 1e-12)], [number], **style)
        distance.annotate(
            f"{row['frechet']:.3g}",
            (max(row["frechet"], 1e-12), number),
            (7, -3),
            textcoords="offset points",
            fontsize=7,
        )
        shares.plot([row["recall"]], [row["precision"]], label=label, **style)
    distance.set_xscale("log")
    distance.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    distance.invert_yaxis()
    distance.margins(x=0.15, y=0.1)
    distance.set_xlabel("Frechet distance (less is better)", fontsize=8)
    shares.set_xlim(-0.03, 1.03)
    shares.set_ylim(-0.03, 1.03)
    shares.set_xlabel("recall: images that samples reach", fontsize=8)
    shares.set_ylabel("precision: samples that look like images", fontsize=8)
    shares.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (distance, shares):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    finish(figure, path, title)
