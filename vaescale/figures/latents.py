"""The aggregate posterior: how many components it has, and where its information lies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.drawing import COLOURS, MARKERS, POINT_COLOURS, finish, look, subplots


def mixture_selection(
    path: Path, candidates: Sequence[dict[str, float]], *, chosen: int, prior_nats: float, title: str
) -> None:
    """Mean log density on training and held-out latents, and BIC, over the number of components. candidates: `components`,
    `train_nats`, `val_nats` and `bic` of each; prior_nats: held out, under the model's own prior.
    """
    figure, axes = subplots(1, 2, (9.0, 3.2), frame=True)
    ordered = sorted(candidates, key=lambda one: one["components"])
    numbers = [one["components"] for one in ordered]
    density, bic = axes[0]
    for name, words, style, colour in (
        ("train_nats", "training", "-s", COLOURS[0]),
        ("val_nats", "held out", "-o", COLOURS[1]),
    ):
        values = [one[name] for one in ordered]
        density.plot(numbers, values, style, color=colour, label=words, linewidth=1.3, markersize=4)
    density.axhline(
        prior_nats, color="0.4", linestyle=":", linewidth=1.2, label="the model's prior, held out"
    )
    density.set_title("mean log density of q(z) (nats)", fontsize=9)
    bic.plot(
        numbers, [one["bic"] for one in ordered], "-^", color=POINT_COLOURS[2], linewidth=1.3, markersize=4
    )
    bic.set_title("BIC (less is better)", fontsize=9)
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
    """KL by latent in falling order, active ones in colour; and the collapsed share over epsilon, a line (label, epsilons,
    shares) for each delta.
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
    """Points of a log density against mean log sigma, a colour and a marker for each set (name, densities, log sigmas)."""
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
    """Points [N, 2], a colour and a marker for each class (-1: none), whose number is drawn at its median where there are at most 20.
    axes_label: what the two axes are.
    """
    figure, axes = subplots(1, 1, (6.4, 6.0), frame=True)
    axis = axes[0, 0]
    classes = sorted(set(labels.tolist()))
    for number, one in enumerate(classes):
        here = points[labels == one]
        colour, marker = look(number)
        axis.plot(here[:, 0], here[:, 1], marker, color=colour, markersize=3, alpha=0.5, linestyle="none")
        if one >= 0 and len(classes) <= 20:
            place = np.median(here, axis=0)
            axis.text(
                *place,
                str(one),
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
    """Stacked bars (label, latent, observed) of a variance."""
    figure, axes = subplots(1, 1, (6.4, 0.5 * len(bars) + 1.2), frame=True)
    axis = axes[0, 0]
    labels = [label for label, _, _ in bars]
    latent = [part for _, part, _ in bars]
    axis.barh(labels, latent, color=COLOURS[0], label="from z: Var E[x|z]", height=0.6)
    axis.barh(
        labels,
        [part for _, _, part in bars],
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
