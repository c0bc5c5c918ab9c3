"""Arrays to PNG files, without a display. Legend: images [N, C, H, W] in [0, 1], N read row by row."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.files import write_whole

Images = NDArray[np.float32]
CELL_INCHES = 0.62
# From Okabe & Ito's palette: distinct for the colour-blind and in grey.
COLOURS = ("#0072B2", "#D55E00")
POINT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")


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
    figure, axes = _subplots(len(rows), columns, size)
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for cell, image in zip(line, images, strict=False):
            _show(cell, image)
    _finish(figure, path, title)


def sample_panels(path: Path, panels: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Named panels of samples, each as square as can be, two beside each other."""
    count = len(panels[0][1])
    columns = max(8, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    size = (
        2 * columns * CELL_INCHES * 0.75 + 0.6,
        math.ceil(len(panels) / 2) * (rows * CELL_INCHES * 0.75 + 0.4) + 0.4,
    )
    figure, axes = _subplots(math.ceil(len(panels) / 2), 2, size)
    for cell, (name, images) in zip(axes.flat, panels, strict=False):
        _show(cell, _montage(images, columns))
        cell.set_title(name, fontsize=9)
    _finish(figure, path, title)


def image_map(path: Path, images: Images, *, title: str) -> None:
    """A square of images without gaps."""
    side = math.isqrt(len(images))
    inches = min(12.0, max(5.0, 0.4 * side))
    figure, axes = _subplots(1, 1, (inches, inches + 0.4))
    _show(axes[0, 0], _montage(images, side, gap=0))
    _finish(figure, path, title)


def training_curves(path: Path, rows: Sequence[dict[str, float]], *, title: str) -> None:
    """Negative ELBO, KL, mean squared error, and what else changes, over steps: training as lines, held-out data as dots."""
    # With a sigma fitted to each image itself the loss is no bound on unseen data, and has another name.
    profile = any("train/neg_profile_elbo_nats" in row for row in rows)
    panels = (
        ("loss (nats), what is minimized", "loss_nats"),
        ("negative profile ELBO (nats), no bound", "neg_profile_elbo_nats")
        if profile
        else ("negative ELBO (nats)", "neg_elbo_nats"),
        ("KL (nats)", "kl_nats"),
        ("mean squared error", "mse"),
        ("sigma", "sigma"),
        ("beta", "beta"),
        ("MMD", "mmd"),
    )
    # What never changes is no curve, nor is a loss that is the bound.
    idle = {
        name for name in ("sigma", "beta") if len({row.get(f"train/{name}") for row in rows} - {None}) < 2
    }
    idle |= set() if any(_is_news(row) for row in rows) else {"loss_nats"}
    names = {name.partition("/")[2] for row in rows for name in row}
    drawn = [panel for panel in panels if panel[1] in names - idle] or [*panels]
    figure, axes = _subplots(1, len(drawn), (3.1 * len(drawn), 2.9), frame=True)
    for axis, (label, name) in zip(axes.flat, drawn, strict=True):
        shown: list[float] = []
        for prefix, words, style, colour in (
            ("train", "train", "-", COLOURS[0]),
            ("val", "held out", "o", COLOURS[1]),
        ):
            points = [(row["step"], row[f"{prefix}/{name}"]) for row in rows if f"{prefix}/{name}" in row]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, style, color=colour, label=words, linewidth=1.3, markersize=4)
                shown += values
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        if name in ("mse", "sigma") and shown and max(shown) > 3 * min(shown):
            _logarithmic(axis)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.25, which="both")
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    _finish(figure, path, title)


def _is_news(row: dict[str, float]) -> bool:
    """Whether the row has a loss, and it says something that the negative ELBO does not."""
    if "train/loss_nats" not in row:
        return False
    bound = row.get("train/neg_elbo_nats", row.get("train/neg_profile_elbo_nats", math.nan))
    return not math.isclose(row["train/loss_nats"], bound, rel_tol=1e-4)


def group_rates(path: Path, rows: Sequence[dict[str, float]], labels: Sequence[str], *, title: str) -> None:
    """The training KL of each group over steps as colours, and of the last step as bars. labels: one for each group."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    names = [f"train/group_kl_nats/{number:02d}" for number in range(len(labels))]
    logged = [row for row in rows if all(name in row for name in names)]
    if not logged:
        return
    steps = [row["step"] for row in logged]
    nats = np.array([[max(row[name], 0.0) for row in logged] for name in names])
    figure, axes = _subplots(1, 2, (9.0, max(2.6, 0.16 * len(labels) + 1.2)), frame=True)
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
    colours.set_title("training KL of each group (nats), the top above", fontsize=9)
    bars.barh(range(len(labels)), nats[:, -1], color=COLOURS[0], height=0.8)
    bars.set_title(f"step {steps[-1]}: {nats[:, -1].sum():.1f} nats", fontsize=9)
    bars.grid(alpha=0.25, axis="x")
    bars.set_ylim(-0.5, len(labels) - 0.5)
    for axis, words in ((colours, "step"), (bars, "nats")):
        axis.set_yticks(range(len(labels)), labels, fontsize=6 if len(labels) > 20 else 7)
        axis.invert_yaxis()
        axis.set_xlabel(words, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    _finish(figure, path, title)


def image_strips(path: Path, rows: Sequence[tuple[str, Images]], *, title: str) -> None:
    """Named rows of equally many images, close together: for tables of pictures."""
    count = max(len(images) for _, images in rows)
    figure, axes = _subplots(len(rows), 1, (0.36 * count + 1.6, 0.38 * len(rows) + 0.5), dpi=85)
    for (name, images), axis in zip(rows, axes[:, 0], strict=True):
        _show(axis, _montage(images, count))
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=7)
    _finish(figure, path, title)


def rate_distortion(
    path: Path,
    curve: Sequence[tuple[str, float, float]],
    points: Sequence[tuple[str, float, float]],
    *,
    title: str,
) -> None:
    """(label, KL in nats, mean squared error): a labelled curve, and points that the legend names, the last one in place
    too.
    """
    figure, axes = _subplots(1, 1, (8.6, 5.2), frame=True)
    axis = axes[0, 0]
    if curve:
        labels, rates, distortions = zip(*curve, strict=True)
        axis.plot(
            rates, distortions, "-o", color="0.45", linewidth=1.2, markersize=4, label="sigma = 1, beta"
        )
        for label, rate, distortion in zip(labels, rates, distortions, strict=True):
            axis.annotate(
                label, (rate, distortion), (4, 4), textcoords="offset points", fontsize=7, color="0.35"
            )
    for number, (label, rate, distortion) in enumerate(points):
        colour, marker = POINT_COLOURS[number % len(POINT_COLOURS)], MARKERS[number // len(POINT_COLOURS)]
        axis.plot([rate], [distortion], marker, color=colour, markersize=7, label=label, linestyle="none")
    if points:
        label, rate, distortion = points[-1]
        axis.annotate(
            label, (rate, distortion), (8, -14), textcoords="offset points", fontsize=8, weight="bold"
        )
    _logarithmic(axis)
    axis.set_xlabel("rate: KL (nats per image)", fontsize=8)
    axis.set_ylabel("distortion: mean squared error", fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, path, title)


def mixture_selection(
    path: Path, candidates: Sequence[dict[str, float]], *, chosen: int, prior_nats: float, title: str
) -> None:
    """Mean log density on training and held-out latents, and BIC, over the number of components. candidates: `components`,
    `train_nats`, `val_nats` and `bic` of each; prior_nats: held out, under the model's own prior.
    """
    figure, axes = _subplots(1, 2, (9.0, 3.2), frame=True)
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
        axis.grid(alpha=0.25)
    density.legend(fontsize=7, frameon=False)
    _finish(figure, path, title)


def _logarithmic(axis: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _subplots(
    rows: int, columns: int, size: tuple[float, float], *, frame: bool = False, dpi: int = 130
) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    if not frame:
        for axis in axes.flat:
            axis.set_axis_off()
    return figure, axes


def _show(axis: Any, image: Images) -> None:
    picture = np.clip(np.moveaxis(image, 0, -1), 0, 1)
    axis.imshow(picture[:, :, 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1)


def _montage(images: Images, columns: int, gap: int = 1) -> Images:
    """[N, C, H, W] to one [C, rows*(H+gap)-gap, columns*(W+gap)-gap], white between the images."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = np.ones((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), dtype=np.float32)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(path, picture.getvalue())
