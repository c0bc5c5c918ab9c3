"""Train variants of a recipe: every combination of the values given, each as one run, all below one parent run in MLflow.

The variants are trained one after another on this machine, or --write writes the files of a Slurm array or a Kubernetes
indexed job with one task for each variant. The same command continues a stopped sweep and skips the variants that are trained.

  vaescale sweep recipes/digits/optimal.yaml likelihood.sigma=optimal,0.3,predicted seed=0,1
  vaescale sweep recipes/digits/optimal.yaml optimizer.lr=1e-3,2e-3 --launch "accelerate launch --config_file recipes/backends/cpu2.yaml"
  vaescale sweep recipes/imagenet64/ladder.yaml objective.beta=0.5,1,2 --write slurm
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, the values, and how the runs start."""
    parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="a YAML file, such as recipes/digits/optimal.yaml"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=A,B,C",
        nargs="+",
        help="values of a recipe key, combined with those of every other key; a single value applies to all runs",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the sweep, and the beginning of its runs' names; default: the recipe's name, with -sweep for the sweep",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help='command that starts each run, such as "accelerate launch --multi_gpu --num_processes 8"; default: one process',
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
    """Train all variants, or write the job files. Returns the variants."""
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
    """The exit code of the first variant that failed, or 0."""
    return next((one["exit_code"] for one in result["variants"] if one.get("exit_code")), 0)


def show(result: dict[str, Any]) -> None:
    """Print the variants, and what to do next."""
    from vaescale.system.console import say, table

    def text(one: dict[str, Any]) -> str:
        failed = f"   exit code {one['exit_code']}" if one.get("exit_code") else ""
        return f"{' '.join(one['overrides'][:-1])}{failed}"

    table(result["sweep"], [(one["name"], text(one)) for one in result["variants"]])
    if "files" in result:
        table("files", [(Path(path).name, path) for path in result["files"]])
    elif "folder" in result:
        say(f"next: vaescale compare-runs {result['folder']}")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
