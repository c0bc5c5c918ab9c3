"""Compare runs from their folders or from an MLflow experiment: a table and one HTML page. Imports no torch."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vaescale import figures
from vaescale.commands.signature import checked
from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.figures.curves import is_logarithmic
from vaescale.figures.page import comparison_page
from vaescale.figures.page_content import Content, Panel, Plane, Row
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.recipe import load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs import mlflow_state
from vaescale.runs.comparison import (
    Comparison,
    Record,
    cells,
    compare,
    finite_points,
    groups,
    in_brief,
    is_of_sequences,
    larger_is_better,
    limited_by,
    markdown,
    measured_by,
    spread,
)
from vaescale.runs.mlflow import stored_runs
from vaescale.runs.mlflow_page import page_of_run
from vaescale.runs.sweeps import runs_of
from vaescale.system.console import say
from vaescale.system.secrets import redact

STORE = "sqlite:///runs/mlflow.db"
OUT = Path("runs/comparison")
MOST_RUNS = 200
CURVES = (
    *("val/neg_elbo_nats", "train/neg_elbo_nats", "val/neg_profile_elbo_nats", "val/mse", "train/kl_nats"),
    *("train/sigma", "val/code_perplexity"),
)
RATE, DISTORTION = "val/kl_nats", "val/mse"
PICTURES = ("reconstructions.png", "samples.png")
OF_SEQUENCES = {
    "reconstructions.png": "sequences: truth, decoded frames and a future",
    "samples.png": "sequences: truth, decoded frames, best and other futures",
}
PROGRESS = re.compile(r"step-(\d+)\.png")  # pictures that were drawn during training
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
    more = tuple(dict.fromkeys([*metrics, *([sort] if sort else [])]))
    records = (
        records_of_experiment(store, experiment, where, curves=more)
        if experiment
        else records_of_folders(runs)
    )
    if len(records) < 2:
        number = "only one run has" if records else "no run has"
        raise UserError(f"{number} metrics to compare; give at least two runs")
    comparison = compare(records, sort=sort, columns=metrics)
    say(f"compare-runs: {len(records)} runs, into {out}")
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(comparison, out)
    (out / "comparison.md").write_text(markdown(comparison))
    pngs = [(caption, path.read_bytes()) for caption, path in drawn]
    (out / "comparison.html").write_text(page(comparison, pngs, title=experiment or f"{len(records)} runs"))
    return {
        "sorted_by": comparison.sort,
        "runs": in_brief(comparison),
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
    return "binary mass" if section.measure == "mass" and section.own_levels == 2 else section.measure


def page(comparison: Comparison, pngs: Sequence[tuple[str, bytes]], *, title: str) -> str:
    """The HTML page: the table, the curves, and the pictures of the runs side by side.

    pngs: the figures (caption, PNG) for browsers without scripts.
    """
    head, rows = cells(comparison)
    together = groups(comparison.records)
    line_of = {id(record): number for number, (_, group) in enumerate(together) for record in group}
    return comparison_page(
        Content(
            title=title,
            head=head[1:],
            settings=len(comparison.differing),
            rows=[
                Row(record.name, redact(record.location), line_of[id(record)], row[1:], record.link)
                for record, row in zip(comparison.records, rows, strict=True)
            ],
            groups=[label for label, _ in together],
            sorted_by=comparison.sort,
            panels=panels_of(comparison),
            plane=_plane(comparison),
            warnings=comparison.warnings,
            stills=pngs,
            strips=_strips(comparison.records),
        )
    )


def panels_of(comparison: Comparison) -> list[Panel]:
    """The curves of each metric that a run has, with the runs that lack it. A run may have a single point."""
    together = groups(comparison.records)
    panels = []
    for metric in dict.fromkeys((*CURVES, *comparison.columns)):
        lines = [(number, spread(group, metric)) for number, (_, group) in enumerate(together)]
        lines = [(number, points) for number, points in lines if points]
        if metric not in CURVES and all(len(points) < 2 for _, points in lines):
            continue  # the result of a verb, or a metric that the table has anyway
        if lines:
            values = [value for _, points in lines for _, *heights in points for value in heights]
            missing = [record.name for record in comparison.records if not finite_points(record, metric)]
            panels.append(Panel(metric, lines, is_logarithmic(metric, values), missing))
    return panels


def _plane(comparison: Comparison) -> Plane | None:
    points = [
        (number, record.metrics[RATE], record.metrics[DISTORTION])
        for number, record in enumerate(comparison.records)
        if all(math.isfinite(record.metrics.get(name, math.nan)) for name in (RATE, DISTORTION))
    ]
    return Plane(RATE, DISTORTION, points) if points else None


def _strips(records: Sequence[Record]) -> list[tuple[str, list[tuple[int, str, bytes]]]]:
    """Pictures side by side. Runs that lack one show the last picture of their training too."""
    strips, kinds = [], (False, True)
    for name in PICTURES:
        for of_sequences in kinds:
            shown = [
                (number, "", record.pictures[name])
                for number, record in enumerate(records)
                if name in record.pictures and is_of_sequences(record) == of_sequences
            ]
            strips.append((OF_SEQUENCES[name] if of_sequences else name.removesuffix(".png"), shown))
    for of_sequences in kinds:
        during = []
        for number, record in enumerate(records):
            drawn = sorted(name for name in record.pictures if PROGRESS.fullmatch(name))
            has_all = all(name in record.pictures for name in PICTURES)
            if drawn and not has_all and is_of_sequences(record) == of_sequences:
                during.append((number, f", step {int(drawn[-1][5:-4])}", record.pictures[drawn[-1]]))
        of_what = "sequences: " if of_sequences else ""
        strips.append((f"{of_what}last pictures of the training", during))
    return [(heading, pictures) for heading, pictures in strips if pictures]


def records_of_folders(folders: Sequence[Path]) -> list[Record]:
    """The record of each run, once. A run of a sweep without metrics is left out, with a message that names it."""
    records: dict[Path, Record] = {}
    for folder in folders:
        runs = runs_of(folder)
        for run in [run for run in runs if run not in records]:
            try:
                records[run] = record_of_folder(run)
            except UserError as error:
                if runs == [folder]:
                    raise
                say(f"left out: {error}")
    return list(records.values())


def record_of_folder(folder: Path) -> Record:
    """The record of a run folder, with the last value of each metric. Raises UserError where there is no run, or no metric yet."""
    if not (folder / run_folder.RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder (no {run_folder.RECIPE}); leave it out")
    recipe = load_recipe(folder / run_folder.RECIPE)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run_folder.read_metrics(folder):
        for name in row.keys() - {"step", "time"}:
            curves.setdefault(name, []).append((row["step"], row[name]))
    if not curves:
        raise UserError(f"{folder} has no metrics yet; train it, or leave it out")
    paths = [_picture(folder / "figures" / name) for name in PICTURES]
    paths += sorted((folder / "figures" / "progress").glob("step-*.png"))[-1:]
    names = [*PICTURES, *(path.name for path in paths[len(PICTURES) :])]
    pictures = {name: read_picture(path) for name, path in zip(names, paths, strict=True)}
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
        link=_page_of(folder),
    )


def _picture(path: Path) -> Path:
    """The picture, or the newest of a part of the images (`evaluate --images`) where it is missing."""
    others = path.parent.glob(f"{path.stem}-val-first-*{path.suffix}")
    return path if path.exists() else max(others, key=lambda other: other.stat().st_mtime, default=path)


def _page_of(folder: Path) -> str:
    """The address of the run's page in MLflow, or "" without one."""
    state: dict[str, Any] = {}
    with suppress(UserError):  # a damaged file costs the link only
        state = mlflow_state.read(folder)
    uri, *ids = (str(state.get(name, "")) for name in ("tracking_uri", "experiment_id", "run_id"))
    return page_of_run(uri, *ids)


def records_of_experiment(
    store: str, experiment: str, where: str | None, *, curves: Sequence[str] = ()
) -> list[Record]:
    """The runs of an MLflow experiment, the latest first. curves: metrics whose curves are read besides the usual ones."""
    stored = stored_runs(
        store,
        experiment,
        where,
        most=MOST_RUNS,
        curves=tuple(dict.fromkeys((*CURVES, *curves))),
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
            link=page_of_run(store, run.experiment_id, run.place),
        )
        for run in stored
        if run.recipe
        and run.metrics  # the parent run of a sweep has no recipe, nor has a run that logs a study
    ]


def draw_figures(comparison: Comparison, folder: Path) -> list[tuple[str, Path]]:
    """Draw the figures for which the runs have metrics. Returns the caption and path of each."""
    together = groups(comparison.records)
    drawn = []
    panels = panels_of(comparison)
    if panels:
        several = any(len(records) > 1 for _, records in together)
        title = "curves; bands are the spread of runs that differ in the seed" if several else "curves"
        figures.curves_of_runs(
            folder / "curves.png",
            [
                (panel.metric, [(together[number][0], points) for number, points in panel.lines])
                for panel in panels
            ],
            missing={panel.metric: panel.missing for panel in panels},
            title=title,
        )
        drawn.append(("curves", folder / "curves.png"))
    if plane := _plane(comparison):
        points = [(comparison.records[number].name, rate, mse) for number, rate, mse in plane.points]
        path = folder / "rate_distortion.png"
        held_out = "sequences" if all(map(is_of_sequences, comparison.records)) else "images"
        figures.rate_distortion(path, [], points, title=f"rate and distortion, held-out {held_out}")
        drawn.append(("rate and distortion", path))
    return drawn


def read_picture(path: Path) -> bytes | None:
    """The bytes of a PNG file, or None when the file is missing or of another type."""
    content = path.read_bytes() if path.is_file() else b""
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None
