"""Curves and planes of training runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vaescale.figures.drawing import (
    COLOURS,
    DISTINCT,
    LABEL_POINTS,
    STYLES,
    TICK_POINTS,
    finish,
    logarithmic,
    look,
    plain,
    subplots,
)
from vaescale.figures.labels import label_points

LOGARITHMIC = ("mse", "sigma")  # metrics that fall by factors
LOG_HINT = " (log scale)"
LOG_FROM_RATIO = 3.0  # of the largest value to the smallest
MOST_NAMED_MISSING = 3  # runs


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
        hint = _training_curve(axis, rows, name)
        axis.set_title(f"{label}{hint}", fontsize=LABEL_POINTS)
    finish(figure, path, title)


def _training_curve(axis: Any, rows: Sequence[dict[str, float]], name: str) -> str:
    """Draw one metric over steps: training as a line, held-out data as dots. Returns a hint for the title: a logarithmic scale."""
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
    axis.set_xlabel("step", fontsize=LABEL_POINTS)
    is_log = is_logarithmic(name, shown)
    if is_log:
        logarithmic(axis, shown)
    axis.tick_params(labelsize=TICK_POINTS, which="both")
    axis.grid(alpha=0.25, which="both")
    if axis.lines:
        axis.legend(fontsize=TICK_POINTS, frameon=False)
    return LOG_HINT if is_log else ""


def is_logarithmic(metric: str, values: Sequence[float]) -> bool:
    """Whether a metric's values are drawn on a logarithmic axis: those that fall by factors, if they do."""
    name = metric.rpartition("/")[2]
    return (
        name in LOGARITHMIC
        and bool(values)
        and min(values) > 0
        and max(values) > LOG_FROM_RATIO * min(values)
    )


def curves_of_runs(
    path: Path,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]]]],
    *,
    missing: Mapping[str, Sequence[str]] = MappingProxyType({}),
    title: str,
) -> None:
    """Draw a panel for each metric, with the label and (step, mean, least, greatest) over repetitions of each run.

    A run with one point is a marker. missing: by metric, the runs that have no value of it, which are named below the panel.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for _, lines in panels for label, _ in lines))
    named = labels[:DISTINCT]
    names = math.ceil(len(named) / (16 * rows))  # columns of the legend
    figure, axes = subplots(rows, columns, (4.2 * columns + 2.2 * names, 3.2 * rows + 0.3), frame=True)
    for axis, (metric, lines) in zip(axes.flat, panels, strict=False):
        for label, points in lines:
            _band(axis, label, labels.index(label), points)
        values = [value for _, points in lines for _, _, low, high in points for value in (low, high)]
        is_log = is_logarithmic(metric, values)
        if is_log:
            logarithmic(axis, values)
        else:
            _zoom(axis, values)
        axis.set_title(f"{metric}{LOG_HINT if is_log else ''}", fontsize=LABEL_POINTS)
        axis.set_xlabel(_below(missing.get(metric, ())), fontsize=LABEL_POINTS)
        axis.tick_params(labelsize=TICK_POINTS)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    shown = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    more = len(labels) - len(named)
    figure.legend(
        [shown[plain(label)] for label in named],
        [plain(label) for label in named],
        title=f"and {more} more" if more else None,
        ncols=names,
        fontsize=TICK_POINTS,
        title_fontsize=TICK_POINTS,
        frameon=False,
        loc="outside right upper",
    )
    finish(figure, path, title)


def _below(missing: Sequence[str]) -> str:
    """The label of a panel's step axis, with the runs that the panel lacks."""
    if not missing:
        return "step"
    more = len(missing) - MOST_NAMED_MISSING
    named = ", ".join(missing[:MOST_NAMED_MISSING]) + (f" and {more} more" if more > 0 else "")
    return f"step\nwithout {plain(named)}"


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
        label=plain(label),
        marker=marker,
        markersize=3 if len(steps) > 1 else 6,
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
            label=plain(label),
        )
    axis.set_aspect("equal")
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.set_xlabel("central interval of p(x|z) (%)", fontsize=LABEL_POINTS)
    axis.set_ylabel("values within the interval (%)", fontsize=LABEL_POINTS)
    axis.tick_params(labelsize=TICK_POINTS)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=TICK_POINTS, frameon=False)
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
    figure, axes = subplots(1, 2, (10.0, max(2.8, 0.18 * len(labels) + 1.2)), frame=True)
    colours, bars = axes[0]
    edges = [0.5, *(step + 0.5 for step in steps)]
    mesh = colours.pcolormesh(
        edges,
        np.arange(len(labels) + 1) - 0.5,
        np.maximum(nats, 1e-3),
        norm=LogNorm(1e-3, max(nats.max(), 1e-2)),
    )
    scale = figure.colorbar(mesh, ax=colours, pad=0.02, extend="min")
    scale.set_label("KL of the group (nats, log scale)", fontsize=LABEL_POINTS)
    scale.ax.tick_params(labelsize=TICK_POINTS)
    colours.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours.set_title("training KL of each group, top group first", fontsize=LABEL_POINTS)
    bars.barh(range(len(labels)), nats[:, -1], color=COLOURS[0], height=0.8)
    total = nats[:, -1].sum()
    bars.set_title(f"at step {steps[-1]:g}: {total:.1f} nats in all groups", fontsize=LABEL_POINTS)
    bars.grid(alpha=0.25, axis="x")
    bars.set_ylim(-0.5, len(labels) - 0.5)
    for axis, label in ((colours, "step"), (bars, "KL of the group (nats)")):
        axis.set_yticks(range(len(labels)), labels, fontsize=TICK_POINTS)
        axis.invert_yaxis()
        axis.set_xlabel(label, fontsize=LABEL_POINTS)
        axis.tick_params(axis="x", labelsize=TICK_POINTS)
    finish(figure, path, title)


def rate_distortion(
    path: Path,
    curve: Sequence[tuple[str, float, float]],
    points: Sequence[tuple[str, float, float]],
    *,
    title: str,
) -> None:
    """Draw (label, KL in nats, mean squared error): a curve and points, each with its label beside it.

    The first DISTINCT points have a colour and a marker of their own and a label; further ones are grey, and their number is said.
    """
    figure, axes = subplots(1, 1, (9.6, 6.4), frame=True)
    axis = axes[0, 0]
    texts = [(label, rate, distortion) for label, rate, distortion in points[:DISTINCT]]
    colours = [look(number)[0] for number in range(len(texts))]
    if curve:
        _, rates, distortions = zip(*curve, strict=True)
        axis.plot(
            rates, distortions, "-o", color="0.45", linewidth=1.2, markersize=4, label="sigma = 1, by beta"
        )
        axis.legend(fontsize=LABEL_POINTS, frameon=False, loc="upper right")
        texts += curve
        colours += ["0.35"] * len(curve)
    for number, (_, rate, distortion) in enumerate(points):
        colour, marker = look(number) if number < DISTINCT else ("0.7", ".")
        axis.plot([rate], [distortion], marker, color=colour, markersize=7, linestyle="none")
    values = [distortion for _, _, distortion in (*curve, *points)]
    hint = LOG_HINT if logarithmic(axis, values) else ""
    axis.margins(x=0.08)
    axis.autoscale_view(scaley=False)
    more = len(points) - DISTINCT
    unnamed = f"\n{more} further runs are grey and without a name" if more > 0 else ""
    axis.set_xlabel(f"rate: KL (nats per image){unnamed}", fontsize=LABEL_POINTS)
    axis.set_ylabel(f"distortion: mean squared error{hint}", fontsize=LABEL_POINTS)
    axis.tick_params(labelsize=TICK_POINTS, which="both")
    axis.grid(alpha=0.25, which="both")
    inks = ["black" if number < len(points) else colour for number, colour in enumerate(colours)]
    label_points(axis, texts, colours=colours, inks=inks)
    finish(figure, path, title)
