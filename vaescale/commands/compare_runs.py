"""Compare runs from their folders or from an MLflow experiment: a Markdown table and one HTML page. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vaescale import figures
from vaescale.commands.signature import checked
from vaescale.commands.sweep import runs_of
from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.figures.page import comparison_page
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.recipe import load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.comparison import (
    Comparison,
    Record,
    cells,
    compare,
    groups,
    larger_is_better,
    limited_by,
    markdown,
    measured_by,
    spread,
)
from vaescale.runs.mlflow import stored_runs
from vaescale.system.console import say

STORE = "sqlite:///runs/mlflow.db"
OUT = Path("runs/comparison")
MOST_RUNS = 200
CURVES = ("train/neg_elbo_nats", "val/neg_elbo_nats", "train/kl_nats", "val/mse", "train/sigma")
PICTURES = ("reconstructions.png", "samples.png")
RESULTS = ("evaluation/*.json", "gmm/selection.json")


@checked
def compare_runs(
    runs: Sequence[Path] = (),
    *,
    experiment: str | None = None,
    where: str | None = None,
    store: str = STORE,
    sort: str | None = None,
    metrics: Sequence[str] = (),
    out: Path = OUT,
) -> dict[str, Any]:
    """Write OUT/comparison.html, OUT/comparison.md and the figures. Returns the table, the warnings and the paths.

    runs: folders of runs or sweeps. experiment: instead of `runs`, an MLflow experiment in `store`; where: an MLflow filter
    of its runs. sort: the metric to sort by; metrics: further metrics to show. Raises UserError for fewer than two
    runs, and for a metric that no run has.
    """
    if bool(runs) == bool(experiment):
        raise UserError("give either run folders or --experiment NAME")
    if where and not experiment:
        raise UserError("--where filters the runs of an --experiment; give --experiment too")
    records = records_of_experiment(store, experiment, where) if experiment else records_of_folders(runs)
    if len(records) < 2:
        number = "only one run has" if records else "no run has"
        raise UserError(f"{number} metrics to compare; give at least two runs")
    comparison = compare(records, sort=sort, columns=metrics)
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(comparison, out)
    (out / "comparison.md").write_text(markdown(comparison))
    pngs = [(caption, path.read_bytes()) for caption, path in drawn]
    (out / "comparison.html").write_text(page(comparison, pngs, title=experiment or f"{len(records)} runs"))
    return {
        "sorted_by": comparison.sort,
        "runs": [_row(record, comparison) for record in comparison.records],
        "warnings": comparison.warnings,
        "page": str(out / "comparison.html"),
        "markdown": str(out / "comparison.md"),
        "figures": [str(path) for _, path in drawn],
    }


def measure_of(kind: str) -> str:
    """The measure of a likelihood's log_prob: `density`, `mass`, `binary mass` (binarized images), or "" if unknown."""
    section = LIKELIHOODS.get(kind)
    if section is None:
        return ""
    return "binary mass" if section.measure == "mass" and section.levels == 2 else section.measure


def page(comparison: Comparison, pngs: Sequence[tuple[str, bytes]], *, title: str) -> str:
    """The HTML page: the table, the figures (caption, PNG), and the pictures of the runs side by side."""
    head, rows = cells(comparison)
    strips = []
    for name in PICTURES:
        pictures = [
            (record.name, record.pictures[name]) for record in comparison.records if name in record.pictures
        ]
        if pictures:
            strips.append((name.removesuffix(".png"), pictures))
    return comparison_page(head, rows, title=title, warnings=comparison.warnings, figures=pngs, strips=strips)


def records_of_folders(folders: Sequence[Path]) -> list[Record]:
    """The record of each run, once. A run of a sweep without metrics is left out, with a message that names it."""
    records: dict[Path, Record] = {}
    for folder in folders:
        runs = runs_of(folder)
        for run in [run for run in runs if run not in records]:
            try:
                records[run] = _record_of_folder(run)
            except UserError as error:
                if runs == [folder]:
                    raise
                say(f"left out: {error}")
    return list(records.values())


def _record_of_folder(folder: Path) -> Record:
    """The record of a run folder, with the last value of each metric."""
    if not (folder / run_folder.RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder (no {run_folder.RECIPE}); leave it out")
    recipe = load_recipe(folder / run_folder.RECIPE)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run_folder.read_metrics(folder):
        for name in row.keys() - {"step", "time"}:
            curves.setdefault(name, []).append((row["step"], row[name]))
    if not curves:
        raise UserError(f"{folder} has no metrics yet; train it, or leave it out")
    pictures = {name: read_picture(folder / "figures" / name) for name in PICTURES}
    results = [path.read_bytes() for pattern in RESULTS for path in sorted(folder.glob(pattern))]
    return Record(
        name=recipe.name,
        location=str(folder),
        recipe=flat(recipe.public()),
        metrics={name: points[-1][1] for name, points in curves.items()},
        curves=curves,
        pictures={name: png for name, png in pictures.items() if png},
        data_hash=str(run_folder.read_json(folder / run_folder.TAGS).get("val_data_hash", "")),
        measured=measured_by(results),
        limited=limited_by(results),
        more_is_better=larger_is_better(results),
        measure=measure_of(recipe.likelihood.kind),
    )


def records_of_experiment(store: str, experiment: str, where: str | None) -> list[Record]:
    """The runs of an MLflow experiment, the latest first."""
    stored = stored_runs(
        store,
        experiment,
        where,
        most=MOST_RUNS,
        curves=CURVES,
        pictures=[f"figures/{name}" for name in PICTURES],
        results=RESULTS,
    )
    if len(stored) == MOST_RUNS:
        say(f"only the latest {MOST_RUNS} runs are compared; choose others with --where")
    if not stored:
        raise UserError(
            f"experiment {experiment!r} in {store} has no runs{' with ' + where if where else ''}"
        )
    return [
        Record(
            name=run.name,
            location=run.place,
            recipe=run.recipe,
            metrics=run.metrics,
            curves=run.curves,
            pictures=run.pictures,
            data_hash=run.data_hash,
            measured=measured_by(run.evaluations),
            limited=limited_by(run.evaluations),
            more_is_better=larger_is_better(run.evaluations),
            measure=measure_of(run.recipe.get("likelihood.kind", "")),
        )
        for run in stored
        if run.recipe
        and run.metrics  # the parent run of a sweep has no recipe, nor has a run that logs a study
    ]


def draw_figures(comparison: Comparison, folder: Path) -> list[tuple[str, Path]]:
    """Draw the figures for which the runs have metrics. Returns the caption and path of each."""
    together = groups(comparison.records)
    panels = []
    for metric in CURVES:
        lines = [(label, spread(records, metric)) for label, records in together]
        lines = [(label, points) for label, points in lines if len(points) > 1]
        if lines:
            panels.append((metric, lines))
    drawn = []
    if panels:
        several = any(len(records) > 1 for _, records in together)
        title = "curves; bands are the spread of runs that differ in the seed" if several else "curves"
        figures.curves_of_runs(folder / "curves.png", panels, title=title)
        drawn.append(("curves", folder / "curves.png"))
    plane = [
        (record.name, record.metrics["val/kl_nats"], record.metrics["val/mse"])
        for record in comparison.records
        if {"val/kl_nats", "val/mse"} <= record.metrics.keys()
    ]
    if plane:
        figures.rate_distortion(
            folder / "rate_distortion.png", [], plane, title="rate and distortion, held-out images"
        )
        drawn.append(("rate and distortion", folder / "rate_distortion.png"))
    return drawn


def read_picture(path: Path) -> bytes | None:
    """The bytes of a PNG file, or None when the file is missing or of another type."""
    content = path.read_bytes() if path.is_file() else b""
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None


def _row(record: Record, comparison: Comparison) -> dict[str, Any]:
    return {
        "name": record.name,
        "place": record.location,
        **{key: record.recipe.get(key) for key in comparison.differing},
        **{name: record.metrics.get(name) for name in comparison.columns},
    }
