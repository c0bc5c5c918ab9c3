"""Start a recipe, or another verb, on all processes: the ranks of this machine, of a Slurm job, a Kubernetes job or mpirun.

The environment says how many nodes there are and which one this is. Type it once on one machine, or let the cluster start it
on each node (`srun vaescale launch RECIPE`) or as each task. All meet before training begins, and a missing one is named. What
follows the recipe or the verb belongs to that verb:

  vaescale launch recipes/digits/optimal.yaml training.steps=100
  vaescale launch --processes 2 --backend zero2 recipes/digits/optimal.yaml
  vaescale launch --processes 2 evaluate runs/digits-optimal --json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer, real

PASSES_ARGUMENTS_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the call, and what the environment may not say."""
    parser.add_argument(
        "words",
        metavar="RECIPE|VERB",
        nargs=argparse.REMAINDER,
        help="a recipe and its KEY=VALUE, or a verb that runs on several processes, and its arguments",
    )
    parser.add_argument(
        "--processes",
        type=integer(1),
        metavar="N",
        help="ranks on each node; default: one for each GPU, or 1",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="a file of recipes/backends, such as zero2, or a path; default: ddp, or cpu2 without GPUs",
    )
    parser.add_argument(
        "--nodes", type=integer(1), metavar="N", help="number of nodes; default: the cluster's"
    )
    parser.add_argument("--node", type=integer(0), metavar="N", help="this node's number, from 0")
    parser.add_argument("--address", metavar="HOST", help="name or address of node 0")
    parser.add_argument(
        "--port", type=integer(1, 65535), metavar="N", help="a free port of node 0, the same on all nodes"
    )
    parser.add_argument(
        "--wait",
        type=real(above=0),
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for all nodes; default: 300",
    )
    parser.add_argument(
        "--variants",
        type=Path,
        metavar="FILE",
        help="variants.txt of a sweep: add those of this task's number",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command and the variables, and stop; after the recipe it is train's, and prints the plan",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the processes of this node. Returns the exit code, or what would start."""
    from vaescale.commands.launch import launch

    names = ("processes", "backend", "nodes", "node", "address", "port", "wait", "variants", "dry_run")
    # After the words, options belong to the verb; a --json before them does, too.
    words = [*arguments.words, *(["--json"] if arguments.json and not arguments.dry_run else [])]
    arguments.json = arguments.json and arguments.dry_run  # the verb prints the one object itself
    return launch(words, **{name: getattr(arguments, name) for name in names})


def exit_code(result: dict[str, Any]) -> int:
    """Return the exit code of what was started."""
    return int(result.get("exit_code", 0))


def show(result: dict[str, Any]) -> None:
    """Print what a dry run would start. What was started has printed its own result."""
    from vaescale.system.console import table

    if "command" in result:
        variables = " ".join(f"{name}={value}" for name, value in result["variables"].items())
        rows = [
            ("understood", result["understood"]),
            ("command", result["command"]),
            ("variables", variables or "none"),
        ]
        table("vaescale launch", rows)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
