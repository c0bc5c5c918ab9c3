"""Compare runs: a table of what differs in their recipes and of their last numbers, their curves with the spread over seeds, the
rate-distortion plane, and their pictures side by side.

Runs come from their folders, or from an MLflow experiment. Writes OUT/comparison.html, one page that needs nothing else, and
OUT/comparison.md.

  vaescale compare-runs runs/digits-optimal runs/digits-fixed runs/digits-predicted
  vaescale compare-runs runs/digits-* --sort quality/digits/prior-mean/frechet
  vaescale compare-runs runs/digits-optimal-sweep
  vaescale compare-runs --experiment digits --where "params.`likelihood.kind` = 'gaussian'"
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaescale.errors import UserError

if TYPE_CHECKING:
    from vaescale.commands.compare_runs import Comparison, Record

STORE = "sqlite:///runs/mlflow.db"
MOST_RUNS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUNs or an experiment; what is shown; where to."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="*",
        help="run folders, or a sweep's folder for all of its runs",
    )
    parser.add_argument("--experiment", metavar="NAME", help="instead: the runs of an MLflow experiment")
    parser.add_argument(
        "--where", metavar="FILTER", help='of them, in MLflow\'s words: "metrics.`val/mse` < 0.01"'
    )
    parser.add_argument("--store", default=STORE, metavar="URI", help=f"of MLflow; default: {STORE}")
    parser.add_argument(
        "--sort", metavar="METRIC", help="the best first; default: the bound on held-out images"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="METRIC",
        help="also shown; may be given several times",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), metavar="OUT", help="default: runs/comparison"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gather, compare, write. Returns the table."""
    from vaescale.commands import compare_runs as comparing

    if bool(arguments.runs) == bool(arguments.experiment):
        raise UserError("give run folders, or --experiment NAME; one of the two")
    if arguments.where and not arguments.experiment:
        raise UserError("--where chooses among the runs of an --experiment")
    if arguments.experiment:
        records = _of_experiment(arguments.store, arguments.experiment, arguments.where)
    else:
        records = _of_folders(arguments.runs)
    if len(records) < 2:
        there = "is one run alone" if records else "are no runs"
        raise UserError(f"there {there} with anything to compare; give at least two")
    comparison = comparing.compare(records, sort=arguments.sort, columns=arguments.metric)
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = _draw(comparison, arguments.out)
    table = comparing.markdown(comparison)
    (arguments.out / "comparison.md").write_text(table)
    title = arguments.experiment or f"{len(records)} runs"
    figures = [(caption, path.read_bytes()) for caption, path in drawn]
    (arguments.out / "comparison.html").write_text(comparing.page(comparison, figures, title=title))
    return {
        "sorted_by": comparison.sort,
        "runs": [
            {
                "name": record.name,
                "place": record.place,
                **{key: record.recipe.get(key) for key in comparison.differing},
                **{name: record.metrics.get(name) for name in comparison.columns},
            }
            for record in comparison.records
        ],
        "warnings": comparison.warnings,
        "page": str(arguments.out / "comparison.html"),
        "markdown": str(arguments.out / "comparison.md"),
        "figures": [str(path) for _, path in drawn],
    }


def _of_folders(given: list[Path]) -> "list[Record]":
    """Each run once. Of a sweep's runs those that have not begun are passed over aloud."""
    from vaescale.commands.sweep import runs_of
    from vaescale.system.console import say

    found: dict[Path, Record] = {}
    for folder in given:
        runs = runs_of(folder)
        for run in [run for run in runs if run not in found]:
            try:
                found[run] = _of_folder(run)
            except UserError as error:
                if runs == [folder]:
                    raise
                say(f"left out: {error}")
    return list(found.values())


def _of_folder(folder: Path) -> "Record":
    """Of a run folder, its last value of each metric."""
    from vaescale.commands.compare_runs import MEASURED, PICTURES, Record, measured_by, read_picture
    from vaescale.config import flat
    from vaescale.recipe import load_recipe
    from vaescale.runs import folder as run_folder

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
    return Record(
        name=recipe.name,
        place=str(folder),
        recipe=flat(recipe.public()),
        metrics={name: points[-1][1] for name, points in curves.items()},
        curves=curves,
        pictures={name: png for name, png in pictures.items() if png},
        data_hash=str(run_folder.read_json(folder / run_folder.TAGS).get("val_data_hash", "")),
        measured=measured_by(path.read_bytes() for place in MEASURED for path in sorted(folder.glob(place))),
    )


def _of_experiment(store: str, experiment: str, where: str | None) -> "list[Record]":
    """The runs of an MLflow experiment, the latest first."""
    from vaescale.commands.compare_runs import CURVES, MEASURED, PICTURES, Record, measured_by
    from vaescale.runs.mlflow import stored_runs
    from vaescale.system.console import say

    found = stored_runs(
        store,
        experiment,
        where,
        most=MOST_RUNS,
        curves=CURVES,
        pictures=[f"figures/{name}" for name in PICTURES],
        results=MEASURED,
    )
    if len(found) == MOST_RUNS:
        say(f"these are the latest {MOST_RUNS} runs; --where chooses others")
    if not found:
        raise UserError(
            f"experiment {experiment!r} in {store} has no runs{' of which ' + where + ' is true' if where else ''}"
        )
    # What stands above a sweep, or was logged for several runs together, has no recipe.
    return [Record(*one[:-1], measured_by(one.evaluations)) for one in found if one.recipe and one.metrics]


def _draw(comparison: "Comparison", folder: Path) -> list[tuple[str, Path]]:
    """The figures that there are numbers for, each with its caption."""
    from vaescale import figures
    from vaescale.commands import compare_runs as comparing

    together = comparing.groups(comparison.records)
    panels = []
    for metric in comparing.CURVES:
        lines = [(label, comparing.spread(records, metric)) for label, records in together]
        lines = [(label, points) for label, points in lines if len(points) > 1]
        if lines:
            panels.append((metric, lines))
    made = []
    if panels:
        several = any(len(records) > 1 for _, records in together)
        title = "curves; bands are the spread of runs that differ in the seed" if several else "curves"
        figures.curves_of_runs(folder / "curves.png", panels, title=title)
        made.append(("curves", folder / "curves.png"))
    plane = [
        (record.name, record.metrics["val/kl_nats"], record.metrics["val/mse"])
        for record in comparison.records
        if {"val/kl_nats", "val/mse"} <= record.metrics.keys()
    ]
    if plane:
        figures.rate_distortion(
            folder / "rate_distortion.png", [], plane, title="rate and distortion, held-out images"
        )
        made.append(("rate and distortion", folder / "rate_distortion.png"))
    return made


def show(result: dict[str, Any]) -> None:
    """The table, best first, and where the page is."""
    from vaescale.system.console import table

    sys.stdout.write(Path(result["markdown"]).read_text())
    table(
        f"sorted by {result['sorted_by']}",
        [("page", result["page"]), ("markdown", result["markdown"])]
        + [("figure", path) for path in result["figures"]],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
