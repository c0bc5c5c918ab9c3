"""Histograms of scores of two kinds of images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.drawing import COLOURS, LABEL_POINTS, STYLES, TICK_POINTS, finish, subplots

BINS = 50
SHOWN_PERCENT = (0.5, 99.5)  # of all scores: a few far ones would leave the others in one bin
COLUMNS = 3
Panel = tuple[str, NDArray[np.float64], NDArray[np.float64], str]


def score_histograms(path: Path, panels: Sequence[Panel], *, names: tuple[str, str], title: str) -> None:
    """Draw a panel for each score: (its name, the scores of both kinds, a remark). names: of the two kinds.

    Scores beyond the shown range count in its first or last bin.
    """
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = subplots(rows, columns, (3.4 * columns, 2.4 * rows + 0.6), frame=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, first, second, remark) in zip(axes.flat, panels, strict=False):
        scores = [values[np.isfinite(values)] for values in (first, second)]
        low, high = np.percentile(np.concatenate(scores), SHOWN_PERCENT)
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        for kind, (label, values) in enumerate(zip(names, scores, strict=True)):
            counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
            axis.stairs(counts, edges, color=COLOURS[kind], fill=True, alpha=0.25)
            axis.stairs(counts, edges, color=COLOURS[kind], linestyle=STYLES[kind], label=label)
        axis.set_title(f"{name}\n{remark}", fontsize=LABEL_POINTS)
        axis.tick_params(labelsize=TICK_POINTS)
    axes[0, 0].set_ylabel("share of the images", fontsize=LABEL_POINTS)
    axes[0, 0].legend(fontsize=TICK_POINTS, frameon=False)
    finish(figure, path, title)
