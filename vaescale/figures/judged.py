"""The figure of `vaescale quality`: distances of samples from images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaescale.figures.drawing import MARKERS, POINT_COLOURS, finish, subplots


def quality(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw the Frechet distance of each row on a logarithmic scale, and precision over recall.

    The colour shows the kind of picture, the marker its decoding. rows: `of`, `decode`, `frechet`, `precision` and `recall`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = subplots(1, 2, (10.4, max(3.2, 0.3 * len(rows) + 1.4)), frame=True)
    distance, shares = axes[0]
    sources = list(dict.fromkeys(row["of"] for row in rows))
    decodings = list(dict.fromkeys(row["decode"] or "mean" for row in rows))
    labels = []
    for number, row in enumerate(rows):
        decode = row["decode"] or "mean"
        labels.append(f"{row['of']}{'' if decode == 'mean' else ', ' + decode}")
        style = {
            "color": POINT_COLOURS[sources.index(row["of"]) % len(POINT_COLOURS)],
            "marker": MARKERS[decodings.index(decode) % len(MARKERS)],
            "markersize": 7,
            "linestyle": "none",
            "alpha": 0.8,
        }
        value = max(row["frechet"], 1e-12)
        distance.plot([value], [number], **style)
        distance.annotate(
            f"{row['frechet']:.3g}", (value, number), (7, -3), textcoords="offset points", fontsize=7
        )
        shares.plot([row["recall"]], [row["precision"]], label=labels[-1], **style)
    values = [max(row["frechet"], 1e-12) for row in rows]
    distance.set_xscale("log")
    distance.set_xlim(min(values) / 1.5, max(values) * 2.5)
    distance.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
    distance.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    distance.xaxis.set_minor_formatter(NullFormatter())
    distance.set_yticks(range(len(rows)), labels, fontsize=7)
    distance.invert_yaxis()
    distance.set_xlabel("Frechet distance (lower is better)", fontsize=8)
    shares.set_xlim(-0.03, 1.03)
    shares.set_ylim(-0.03, 1.03)
    shares.set_xlabel("recall: images that samples reach", fontsize=8)
    shares.set_ylabel("precision: samples that look like images", fontsize=8)
    shares.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (distance, shares):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    finish(figure, path, title)
