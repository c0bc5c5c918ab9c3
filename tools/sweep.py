"""Train variants of a recipe: one run for every combination of the values, all under one parent run in MLflow.

The variants are trained one after another on this machine; --write instead writes the files of a Slurm array or a Kubernetes
indexed job with one task for each variant. Run the same command again to continue a stopped sweep; trained variants are skipped.

  vaescale sweep recipes/digits/optimal.yaml likelihood.sigma=optimal,0.3,predicted seed=0,1
  vaescale sweep recipes/digits/optimal.yaml optimizer.lr=1e-3,2e-3 --launch "vaescale launch --processes 2"
  vaescale sweep recipes/imagenet64/ladder.yaml objective.beta=0.5,1,2 --write slurm
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

TERMINAL_LETTERS = 120  # the width of a table where stdout is no terminal
SHIPPED = "one that comes with the package, such as vaescale:digits/optimal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, the values, and the way to start the runs."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help=f"a YAML file, or {SHIPPED}")
    parser.add_argument(
        "overrides",
        metavar="KEY=A,B,C",
        nargs="+",
        help="values of a recipe key, combined with those of every other key; a single value applies to all runs",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the sweep and prefix of its runs' names; default: the recipe's name, with -sweep for the sweep",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help='command that starts each run, such as "vaescale launch --processes 8 --backend zero2"; default: one process, or '
        "`vaescale launch` with --write",
    )
    parser.add_argument(
        "--write",
        choices=("slurm", "kubernetes"),
        help="write the files of a cluster job to runs/NAME instead of training",
    )
    parser.add_argument(
        "--image",
        default="vaescale:latest",
        help="container image for --write kubernetes; default: %(default)s",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the variants and stop")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all variants, or write the job files. Returns the variants with exit codes or files."""
    from vaescale.commands.sweep import sweep

    return sweep(
        arguments.recipe,
        arguments.overrides,
        name=arguments.name,
        launch=arguments.launch,
        write=arguments.write,
        image=arguments.image,
        dry_run=arguments.dry_run,
    )


def exit_code(result: dict[str, Any]) -> int:
    """Return the exit code of the first variant that failed, or 0."""
    return next((row["exit_code"] for row in result["variants"] if row.get("exit_code")), 0)


def show(result: dict[str, Any]) -> None:
    """Print the variants, after training with their numbers, and the next command."""
    from vaescale.system.console import say, table

    def text(variant: dict[str, Any]) -> str:
        failed = f"   exit code {variant['exit_code']}" if variant.get("exit_code") else ""
        return f"{' '.join(variant['overrides'][:-1])}{failed}"

    numbers = result.get("best_first", [])
    listed = [
        variant for variant in result["variants"] if not numbers or variant.get("exit_code")
    ]  # each of those that have numbers is in the table below
    if listed:
        title = f"{result['sweep']}: not trained to the end" if numbers else result["sweep"]
        table(title, [(variant["name"], text(variant)) for variant in listed])
    if numbers:
        from vaescale.runs.comparison import in_columns

        width = shutil.get_terminal_size((TERMINAL_LETTERS, 24)).columns
        lines = [
            f"{result['sweep']}, by {result['sorted_by']}, the best first",
            in_columns(numbers, width=width),
        ]
        sys.stdout.write("\n".join([*lines, *result["warnings"]]) + "\n")
    if "files" in result:
        table("files", [(Path(path).name, path) for path in result["files"]])
    elif "folder" in result:
        say(f"next: vaescale compare-runs {result['folder']}")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
