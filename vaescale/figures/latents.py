"""Figures of the aggregate posterior: mixture selection, use of latents, sigma and density, scatter, variance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.drawing import (
    COLOURS,
    LABEL_POINTS,
    MARKERS,
    POINT_COLOURS,
    TICK_POINTS,
    finish,
    look,
    subplots,
)
from vaescale.figures.labels import label_points

MOST_NAMED = 20  # classes in a scatter
MOST_LETTERS = 24  # of a class's name


def mixture_selection(
    path: Path, candidates: Sequence[dict[str, float]], *, chosen: int, prior_nats: float, title: str
) -> None:
    """Draw the mean log density on training and held-out latents, and BIC, over the number of components.

    candidates: `components`, `train_nats`, `val_nats` and `bic` of each. prior_nats: held-out density under the model's prior.
    """
    figure, axes = subplots(1, 2, (9.0, 3.2), frame=True)
    ordered = sorted(candidates, key=lambda candidate: candidate["components"])
    numbers = [candidate["components"] for candidate in ordered]
    density, bic = axes[0]
    for name, label, style, colour in (
        ("train_nats", "training", "-s", COLOURS[0]),
        ("val_nats", "held out", "-o", COLOURS[1]),
    ):
        values = [candidate[name] for candidate in ordered]
        density.plot(numbers, values, style, color=colour, label=label, linewidth=1.3, markersize=4)
    density.axhline(
        prior_nats, color="0.4", linestyle=":", linewidth=1.2, label="the model's prior, held out"
    )
    density.set_title("mean log density of q(z) (nats)", fontsize=LABEL_POINTS)
    bic.plot(
        numbers,
        [candidate["bic"] for candidate in ordered],
        "-^",
        color=POINT_COLOURS[2],
        linewidth=1.3,
        markersize=4,
    )
    bic.set_title("BIC (lower is better)", fontsize=LABEL_POINTS)
    for axis in (density, bic):
        axis.set_xscale("log")
        axis.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axis.minorticks_off()
        axis.axvline(chosen, color="0.75", linewidth=5, alpha=0.5, zorder=0, label=f"chosen: {chosen}")
        axis.set_xlabel("components (log scale)", fontsize=LABEL_POINTS)
        axis.tick_params(labelsize=TICK_POINTS)
        axis.yaxis.get_offset_text().set_fontsize(TICK_POINTS)
        axis.grid(alpha=0.25)
    density.legend(fontsize=TICK_POINTS, frameon=False)
    finish(figure, path, title)


def latent_use(
    path: Path,
    latent_kl: Sequence[float],
    active: Sequence[bool],
    collapse: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    title: str,
) -> None:
    """Draw the KL of each latent in falling order, with active latents dark, and the collapsed share over epsilon.

    The share is a line (label, epsilons, shares) for each delta.
    """
    figure, axes = subplots(1, 2, (9.4, 3.2), frame=True)
    bars, curves = axes[0]
    order = sorted(range(len(latent_kl)), key=lambda number: -latent_kl[number])
    colours = [COLOURS[0] if active[number] else "0.75" for number in order]
    bars.bar(range(len(order)), [latent_kl[number] for number in order], color=colours, width=0.9)
    bars.set_title(
        f"KL of each latent (nats), {sum(active)} of {len(active)} active (dark)", fontsize=LABEL_POINTS
    )
    bars.set_ylabel("nats", fontsize=LABEL_POINTS)
    bars.set_xlabel("latents, by KL", fontsize=LABEL_POINTS)
    for (label, epsilons, shares), colour, style in zip(
        collapse, POINT_COLOURS, ("-", "--", ":"), strict=False
    ):
        curves.plot(epsilons, shares, style, color=colour, label=label, linewidth=1.5)
    curves.set_xscale("log")
    curves.set_ylim(-0.03, 1.03)
    curves.set_title(
        "share of latents with KL below epsilon for a share 1 - delta of images", fontsize=LABEL_POINTS
    )
    curves.set_xlabel("epsilon (nats, log scale)", fontsize=LABEL_POINTS)
    curves.legend(fontsize=TICK_POINTS, frameon=False)
    for axis in (bars, curves):
        axis.tick_params(labelsize=TICK_POINTS)
        axis.grid(alpha=0.25)
    finish(figure, path, title)


def sigma_and_density(
    path: Path, sets: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, density: str, title: str
) -> None:
    """Draw a log density against mean log sigma, with a colour and a marker for each set (name, densities, log sigmas)."""
    figure, axes = subplots(1, 1, (7.2, 4.2), frame=True)
    axis = axes[0, 0]
    for (name, densities, sigmas), colour, marker in zip(sets, POINT_COLOURS, MARKERS, strict=False):
        axis.plot(
            densities, sigmas, marker, color=colour, label=name, markersize=3, alpha=0.5, linestyle="none"
        )
    everything = [value for _, densities, _ in sets for value in densities]
    is_log = max(everything) - min(everything) > 2000
    if is_log:
        axis.set_xscale("symlog", linthresh=100, subs=(2, 5))
    hint = "; log scale beyond 100" if is_log else ""
    axis.set_xlabel(f"{density} (nats{hint})", fontsize=LABEL_POINTS)
    axis.set_ylabel("mean log sigma(z)", fontsize=LABEL_POINTS)
    axis.tick_params(labelsize=TICK_POINTS)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=LABEL_POINTS, frameon=False, markerscale=2)
    finish(figure, path, title)


def latent_scatter(
    path: Path,
    points: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    class_names: Sequence[str] = (),
    axes_labels: tuple[str, str],
    note: str = "",
    title: str,
) -> None:
    """Draw points [N, 2] with a colour and a marker for each class (-1 without a class).

    The largest classes are named at their medians, at most MOST_NAMED. class_names: by class, else numbers are shown.
    axes_labels: an axis without a label has no numbers either, as its values mean nothing. note: a line below the points.
    """
    figure, axes = subplots(1, 1, (7.4, 7.0), frame=True)
    axis = axes[0, 0]
    sizes = {number: int((labels == number).sum()) for number in sorted(set(labels.tolist()))}
    named = sorted((number for number in sizes if number >= 0), key=lambda number: -sizes[number])[
        :MOST_NAMED
    ]
    texts, colours = [], []
    for place, class_number in enumerate(sizes):
        members = points[labels == class_number]
        colour, marker = look(place) if class_number >= 0 else ("0.6", ".")
        axis.plot(
            members[:, 0], members[:, 1], marker, color=colour, markersize=3, alpha=0.5, linestyle="none"
        )
        if class_number in named:
            name = class_names[class_number] if class_number < len(class_names) else str(class_number)
            median = np.median(members, axis=0)
            texts.append((shortened(name), float(median[0]), float(median[1])))
            colours.append(colour)
    for way, label in zip((axis.xaxis, axis.yaxis), axes_labels, strict=True):
        way.set_label_text(label, fontsize=LABEL_POINTS)
        if not label:
            way.set_ticks([])
    more = len(sizes) - (-1 in sizes) - len(named)
    lines = [note, f"{len(named)} of {len(named) + more} classes are named, the largest ones" if more else ""]
    if below := "\n".join(filter(None, [axes_labels[0], *lines])):
        axis.set_xlabel(below, fontsize=LABEL_POINTS)
    axis.tick_params(labelsize=TICK_POINTS)
    axis.grid(alpha=0.25)
    label_points(axis, texts, colours=colours, centred=True, framed=True)
    finish(figure, path, title)


def shortened(name: str) -> str:
    """A class's name of at most MOST_LETTERS letters."""
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def variance_split(path: Path, bars: Sequence[tuple[str, float, float]], *, data: float, title: str) -> None:
    """Draw stacked bars (label, latent, observed) of a variance, their sums, and the variance of the data as a line."""
    figure, axes = subplots(1, 1, (7.4, 0.5 * len(bars) + 1.7), frame=True)
    axis = axes[0, 0]
    labels = [f"{label}\ntotal {latent + observed:.3g}" for label, latent, observed in bars]
    latent = [value for _, value, _ in bars]
    axis.barh(labels, latent, color=COLOURS[0], label="from z: Var E[x|z]", height=0.6)
    axis.barh(
        labels,
        [value for _, _, value in bars],
        left=latent,
        color=COLOURS[1],
        label="noise: E Var[x|z]",
        height=0.6,
        hatch="//",
        edgecolor="white",
    )
    axis.axvline(data, color="black", linestyle="--", linewidth=1.5, label=f"the data: {data:.3g}")
    axis.set_xlim(0, 1.05 * max(data, *(first + second for _, first, second in bars)))
    axis.invert_yaxis()
    axis.set_xlabel("variance, summed over an image's values in [0, 1]", fontsize=LABEL_POINTS)
    axis.tick_params(labelsize=LABEL_POINTS)
    axis.grid(alpha=0.25, axis="x")
    axis.legend(fontsize=LABEL_POINTS, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    finish(figure, path, title)
