"""Curves and planes of training runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaescale.figures.drawing import COLOURS, DISTINCT, STYLES, finish, logarithmic, look, subplots


def training_curves(path: Path, rows: Sequence[dict[str, float]], *, title: str) -> None:
    """Draw negative ELBO, KL, mean squared error and other changing metrics over steps: training as lines, held out as dots."""
    # A sigma that is fitted to each image gives no bound for unseen images, so the loss has another name.
    profile = any("train/neg_profile_elbo_nats" in row for row in rows)
    panels = (
        ("loss (nats)", "loss_nats"),
        ("negative profile ELBO (nats), no bound", "neg_profile_elbo_nats")
        if profile
        else ("negative ELBO (nats)", "neg_elbo_nats"),
        ("KL (nats)", "kl_nats"),
        ("mean squared error", "mse"),
        ("sigma", "sigma"),
        ("beta", "beta"),
        ("MMD", "mmd"),
        ("code perplexity", "code_perplexity"),
    )
    # A constant gets no panel, nor does a loss that equals the bound.
    idle = {
        name for name in ("sigma", "beta") if len({row.get(f"train/{name}") for row in rows} - {None}) < 2
    }
    idle |= set() if any(_loss_differs(row) for row in rows) else {"loss_nats"}
    idle |= {"kl_nats"} if any("train/code_perplexity" in row for row in rows) else set()
    names = {name.partition("/")[2] for row in rows for name in row}
    drawn = [panel for panel in panels if panel[1] in names - idle] or [*panels]
    size = (3.1 * len(drawn), 2.9)
    figure, axes = subplots(1, len(drawn), size, frame=True, margins=(0.52, 0.12, 0.42, 0.28))
    for axis, (label, name) in zip(axes.flat, drawn, strict=True):
        _training_curve(axis, rows, name)
        axis.set_title(label, fontsize=9)
    finish(figure, path, title)


def _training_curve(axis: Any, rows: Sequence[dict[str, float]], name: str) -> None:
    """Draw one metric over steps: training as a line, held-out data as dots."""
    shown: list[float] = []
    for prefix, label, style, colour in (
        ("train", "train", "-", COLOURS[0]),
        ("val", "held out", "o", COLOURS[1]),
    ):
        points = [(row["step"], row[f"{prefix}/{name}"]) for row in rows if f"{prefix}/{name}" in row]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, style, color=colour, label=label, linewidth=1.3, markersize=4)
            shown += values
    axis.set_xlabel("step", fontsize=8)
    if name in ("mse", "sigma") and shown and max(shown) > 3 * min(shown):
        logarithmic(axis)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.25, which="both")
    if axis.lines:
        axis.legend(fontsize=7, frameon=False)


def curves_of_runs(
    path: Path,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]]]],
    *,
    title: str,
) -> None:
    """Draw a panel for each metric, with the label and (step, mean, least, greatest) over repetitions of each run."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for _, lines in panels for label, _ in lines))
    named = labels[:DISTINCT]
    names = math.ceil(len(named) / (16 * rows))  # columns of the legend
    figure, axes = subplots(rows, columns, (4.2 * columns + 1.8 * names, 3.0 * rows + 0.3), frame=True)
    for axis, (metric, lines) in zip(axes.flat, panels, strict=False):
        for label, points in lines:
            _band(axis, label, labels.index(label), points)
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        _zoom(axis, [value for _, points in lines for _, _, low, high in points for value in (low, high)])
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    shown = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    more = len(labels) - len(named)
    figure.legend(
        [shown[label] for label in named],
        named,
        title=f"and {more} more" if more else None,
        ncols=names,
        fontsize=7,
        title_fontsize=7,
        frameon=False,
        loc="outside right upper",
    )
    finish(figure, path, title)


def _band(axis: Any, label: str, number: int, points: Sequence[tuple[float, float, float, float]]) -> None:
    """Draw the mean of one run over steps as a line, and the range of its repetitions as a band."""
    colour, marker = look(number)
    steps, mean, least, greatest = zip(*points, strict=True)
    axis.plot(
        steps,
        mean,
        STYLES[number % len(STYLES)],
        color=colour,
        linewidth=1.3,
        label=label,
        marker=marker,
        markersize=3,
        markevery=max(1, len(steps) // 10),
    )
    if least != greatest:
        axis.fill_between(steps, least, greatest, color=colour, alpha=0.2, linewidth=0)


def _zoom(axis: Any, values: Sequence[float]) -> None:
    """Crop the few values of a steep beginning, which would flatten the rest of the curve."""
    low, high = np.quantile(values, [0.0, 0.95])
    if max(values) - high > high - low > 0:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def calibration(path: Path, curves: Sequence[tuple[str, Sequence[float]]], *, title: str) -> None:
    """Draw the coverage of central intervals over their level, for each label; below the diagonal p(x|z) is too narrow.

    Coverages are at equal steps up to 1.
    """
    figure, axes = subplots(1, 1, (4.6, 4.4), frame=True)
    axis = axes[0, 0]
    axis.plot([0, 100], [0, 100], color="0.5", linestyle=":", linewidth=1.2, label="calibrated")
    for number, (label, coverage) in enumerate(curves):
        levels = 100 * (np.arange(len(coverage)) + 1) / len(coverage)
        colour, marker = look(number)
        axis.plot(
            [0, *levels],
            [0, *(100 * share for share in coverage)],
            color=colour,
            marker=marker,
            markevery=10,
            markersize=4,
            linewidth=1.3,
            label=label,
        )
    axis.set_aspect("equal")
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.set_xlabel("central interval of p(x|z) (%)", fontsize=8)
    axis.set_ylabel("values within the interval (%)", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)
    finish(figure, path, title)


def _loss_differs(row: dict[str, float]) -> bool:
    """Return whether the row has a loss that differs from the negative ELBO."""
    if "train/loss_nats" not in row:
        return False
    bound = row.get("train/neg_elbo_nats", row.get("train/neg_profile_elbo_nats", math.nan))
    return not math.isclose(row["train/loss_nats"], bound, rel_tol=1e-4)


def group_rates(path: Path, rows: Sequence[dict[str, float]], labels: Sequence[str], *, title: str) -> None:
    """Draw the training KL of each group over steps as colours, and at the last step as bars. labels: one for each group."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    names = [f"train/group_kl_nats/{number:02d}" for number in range(len(labels))]
    logged = [row for row in rows if all(name in row for name in names)]
    if not logged:
        return
    steps = [row["step"] for row in logged]
    nats = np.array([[max(row[name], 0.0) for row in logged] for name in names])
    figure, axes = subplots(1, 2, (9.0, max(2.6, 0.16 * len(labels) + 1.2)), frame=True)
    colours, bars = axes[0]
    edges = [0.5, *(step + 0.5 for step in steps)]
    mesh = colours.pcolormesh(
        edges,
        np.arange(len(labels) + 1) - 0.5,
        np.maximum(nats, 1e-3),
        norm=LogNorm(1e-3, max(nats.max(), 1e-2)),
    )
    figure.colorbar(mesh, ax=colours, pad=0.02, extend="min").ax.tick_params(labelsize=7)
    colours.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours.set_title("training KL of each group (nats), top group first", fontsize=9)
    bars.barh(range(len(labels)), nats[:, -1], color=COLOURS[0], height=0.8)
    bars.set_title(f"step {steps[-1]}: {nats[:, -1].sum():.1f} nats", fontsize=9)
    bars.grid(alpha=0.25, axis="x")
    bars.set_ylim(-0.5, len(labels) - 0.5)
    for axis, label in ((colours, "step"), (bars, "nats")):
        axis.set_yticks(range(len(labels)), labels, fontsize=6 if len(labels) > 20 else 7)
        axis.invert_yaxis()
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    finish(figure, path, title)


def rate_distortion(
    path: Path,
    curve: Sequence[tuple[str, float, float]],
    points: Sequence[tuple[str, float, float]],
    *,
    title: str,
) -> None:
    """Draw (label, KL in nats, mean squared error): a labelled curve, and points that the legend names.

    With a curve, the last point is also labelled beside it.
    """
    figure, axes = subplots(1, 1, (8.6, 5.2), frame=True)
    axis = axes[0, 0]
    if curve:
        _labelled_curve(axis, curve)
    for number, (label, rate, distortion) in enumerate(points):
        colour, marker = look(number)
        name = (
            label
            if number < DISTINCT
            else f"and {len(points) - DISTINCT} more"
            if number == DISTINCT
            else None
        )
        axis.plot([rate], [distortion], marker, color=colour, markersize=7, label=name, linestyle="none")
    if points and curve:
        label, rate, distortion = points[-1]
        axis.annotate(
            label, (rate, distortion), (8, -14), textcoords="offset points", fontsize=8, weight="bold"
        )
    logarithmic(axis)
    axis.set_xlabel("rate: KL (nats per image)", fontsize=8)
    axis.set_ylabel("distortion: mean squared error", fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.25, which="both")
    names = math.ceil(len(points) / 24)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=min(2, names))
    finish(figure, path, title)


def _labelled_curve(axis: Any, curve: Sequence[tuple[str, float, float]]) -> None:
    """Draw the betas of a plain Gaussian, each with its label."""
    labels, rates, distortions = zip(*curve, strict=True)
    axis.plot(rates, distortions, "-o", color="0.45", linewidth=1.2, markersize=4, label="sigma = 1, beta")
    for label, rate, distortion in zip(labels, rates, distortions, strict=True):
        axis.annotate(label, (rate, distortion), (4, 4), textcoords="offset points", fontsize=7, color="0.35")
