"""Compare runs: a table of what differs between their recipes and of their last numbers, their curves with the spread over
seeds, the rate-distortion plane, and their pictures side by side.

Runs come from their folders, or from an MLflow experiment. Writes OUT/comparison.html, one page that needs no other file, and
OUT/comparison.md.

  vaescale compare-runs runs/digits-optimal runs/digits-fixed runs/digits-predicted
  vaescale compare-runs runs/digits-* --sort quality/digits/prior-mean/frechet
  vaescale compare-runs runs/digits-optimal-sweep
  vaescale compare-runs --experiment digits --where "params.`likelihood.kind` = 'gaussian'"
"""

import argparse
import sys
from pathlib import Path
from typing import Any

STORE = "sqlite:///runs/mlflow.db"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUNs or an experiment, what is shown, and where to."""
    add = parser.add_argument
    add("runs", metavar="RUN", type=Path, nargs="*", help="run folders, or a sweep's folder for all its runs")
    add("--experiment", metavar="NAME", help="compare the runs of an MLflow experiment instead")
    filtered = 'choose among its runs by MLflow\'s filter: "metrics.`val/mse` < 0.01"'
    add("--where", metavar="FILTER", help=filtered)
    add("--store", default=STORE, metavar="URI", help=f"MLflow's store; default: {STORE}")
    add(
        "--sort",
        metavar="METRIC",
        help="metric to sort by, the best run first; default: the bound on held-out images",
    )
    shown = "show this metric too; may be given several times"
    add("--metric", action="append", default=[], metavar="METRIC", help=shown)
    out = Path("runs/comparison")
    add("--out", type=Path, default=out, metavar="OUT", help="folder to write to; default: runs/comparison")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gather, compare, write. Returns the table."""
    from vaescale.commands.compare_runs import compare_runs

    return compare_runs(
        arguments.runs,
        experiment=arguments.experiment,
        where=arguments.where,
        store=arguments.store,
        sort=arguments.sort,
        metrics=arguments.metric,
        out=arguments.out,
    )


def show(result: dict[str, Any]) -> None:
    """Print the table, the best run first, and where the page is."""
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
