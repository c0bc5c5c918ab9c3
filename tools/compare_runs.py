"""Compare runs: a table of the recipe keys that differ and of the last metrics, curves with the spread over seeds, the
rate-distortion plane, and pictures side by side.

Runs come from their folders, or from an MLflow experiment. Writes OUT/comparison.html, one page that needs no other file, and
OUT/comparison.md, and prints the table; --markdown prints it as Markdown.

  vaescale compare-runs runs/digits-optimal runs/digits-fixed runs/digits-predicted
  vaescale compare-runs runs/digits-* --sort quality/digits/prior-mean/frechet
  vaescale compare-runs runs/digits-optimal-sweep
  vaescale compare-runs --experiment digits --where 'params.`likelihood.kind` = "gaussian"'
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from vaescale.system.secrets import redact

TERMINAL_LETTERS = 120  # the width of the table where stdout is no terminal
STORE = "sqlite:///runs/mlflow.db"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUNs or an experiment, the metrics, and the output folder."""
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="*",
        help="run folders; the folder of a sweep means all its runs",
    )
    add(
        "--experiment",
        metavar="NAME",
        help="compare the runs of this MLflow experiment instead of run folders",
    )
    filtered = "MLflow filter of the experiment's runs, such as 'metrics.`val/mse` < 0.01'"
    add("--where", metavar="FILTER", help=filtered)
    add("--store", default=STORE, metavar="URI", help=f"MLflow store of the experiment; default: {STORE}")
    add(
        "--sort",
        metavar="METRIC",
        help="metric to sort by, the best run first; default: the bound on held-out images",
    )
    shown = "metric to add to the table; may be given several times"
    add("--metric", action="append", default=[], metavar="METRIC", help=shown)
    out = Path("runs/comparison")
    add(
        "--markdown", action="store_true", help="print the table as Markdown, which OUT/comparison.md has too"
    )
    add("--out", type=Path, default=out, metavar="OUT", help="folder to write to; default: runs/comparison")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the runs and write the page. Returns the table and the paths."""
    from vaescale.commands.compare_runs import compare_runs

    result = compare_runs(
        arguments.runs,
        experiment=arguments.experiment,
        where=arguments.where,
        store=arguments.store,
        sort=arguments.sort,
        metrics=arguments.metric,
        out=arguments.out,
    )
    return {**result, "printed": "markdown"} if arguments.markdown else result


def show(result: dict[str, Any]) -> None:
    """Print the table, the best run first, the warnings, and the paths."""
    from vaescale.runs.comparison import in_columns
    from vaescale.system.console import table

    if result.get("printed") == "markdown":
        sys.stdout.write(Path(result["markdown"]).read_text())
    else:
        width = shutil.get_terminal_size((TERMINAL_LETTERS, 24)).columns
        text = "\n".join([in_columns(result["runs"], width=width), "", *result["warnings"]])
        sys.stdout.write(redact(text).rstrip() + "\n\n")
    table(
        f"sorted by {result['sorted_by']}",
        [("page", result["page"]), ("markdown", result["markdown"])]
        + [("figure", path) for path in result["figures"]],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
