"""Figures of the aggregate posterior: mixture selection, use of latents, sigma and density, scatter, variance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.drawing import COLOURS, MARKERS, POINT_COLOURS, finish, look, subplots


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
    density.set_title("mean log density of q(z) (nats)", fontsize=9)
    bic.plot(
        numbers,
        [candidate["bic"] for candidate in ordered],
        "-^",
        color=POINT_COLOURS[2],
        linewidth=1.3,
        markersize=4,
    )
    bic.set_title("BIC (lower is better)", fontsize=9)
    for axis in (density, bic):
        axis.set_xscale("log")
        axis.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axis.minorticks_off()
        axis.axvline(chosen, color="0.75", linewidth=5, alpha=0.5, zorder=0, label=f"chosen: {chosen}")
        axis.set_xlabel("components", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.yaxis.get_offset_text().set_fontsize(7)
        axis.grid(alpha=0.25)
    density.legend(fontsize=7, frameon=False)
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
    bars.set_title(f"KL of each latent (nats), {sum(active)} of {len(active)} active (dark)", fontsize=9)
    bars.set_xlabel("latents, by KL", fontsize=8)
    for (label, epsilons, shares), colour, style in zip(
        collapse, POINT_COLOURS, ("-", "--", ":"), strict=False
    ):
        curves.plot(epsilons, shares, style, color=colour, label=label, linewidth=1.5)
    curves.set_xscale("log")
    curves.set_ylim(-0.03, 1.03)
    curves.set_title("share of latents with KL below epsilon for a share 1 - delta of images", fontsize=9)
    curves.set_xlabel("epsilon (nats)", fontsize=8)
    curves.legend(fontsize=7, frameon=False)
    for axis in (bars, curves):
        axis.tick_params(labelsize=7)
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
    if max(everything) - min(everything) > 2000:
        axis.set_xscale("symlog", linthresh=100, subs=(2, 5))
    axis.set_xlabel(f"{density} (nats)", fontsize=8)
    axis.set_ylabel("mean log sigma(z)", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, markerscale=2)
    finish(figure, path, title)


def latent_scatter(
    path: Path, points: NDArray[np.float64], labels: NDArray[np.int64], *, axes_label: str, title: str
) -> None:
    """Draw points [N, 2] with a colour and a marker for each class (-1 without a class).

    With at most 20 classes, their numbers are drawn at the medians. axes_label: a label for both axes.
    """
    figure, axes = subplots(1, 1, (6.4, 6.0), frame=True)
    axis = axes[0, 0]
    classes = sorted(set(labels.tolist()))
    for number, class_number in enumerate(classes):
        members = points[labels == class_number]
        colour, marker = look(number)
        axis.plot(
            members[:, 0], members[:, 1], marker, color=colour, markersize=3, alpha=0.5, linestyle="none"
        )
        if class_number >= 0 and len(classes) <= 20:
            median = np.median(members, axis=0)
            axis.text(
                *median,
                str(class_number),
                fontsize=11,
                weight="bold",
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour, "alpha": 0.85},
            )
    axis.set_xlabel(axes_label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    finish(figure, path, title)


def variance_split(path: Path, bars: Sequence[tuple[str, float, float]], *, title: str) -> None:
    """Draw stacked bars (label, latent, observed) of a variance."""
    figure, axes = subplots(1, 1, (6.4, 0.5 * len(bars) + 1.2), frame=True)
    axis = axes[0, 0]
    labels = [label for label, _, _ in bars]
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
    axis.invert_yaxis()
    axis.set_xlabel("variance, summed over an image's values in [0, 1]", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, axis="x")
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    finish(figure, path, title)
