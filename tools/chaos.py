"""Train a recipe twice: once undisturbed, and once while killing, stopping and slowing its processes, filling their /dev/shm,
damaging checkpoints, taking MLflow's files and run away, and asking it to stop. Then compare the two runs.

    vaescale chaos recipes/digits/optimal.yaml --faults 20 --backend cpu2 training.steps=300
    vaescale chaos recipes/digits/optimal.yaml --mtbf-seconds 30 --backend cpu2 training.steps=2000

The expected outcome: the same metrics at every step and the same weights, bit for bit, no row lost, neither in the folder nor in
MLflow, and a sentence for every end. The exit code is 4 otherwise.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import integer, real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, overrides, the number of faults and the way to start training."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", type=Path, help="a YAML file or vaescale:NAME, whose data sets exist")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    faults = "number of starts to disturb; default: 10, or with --mtbf-seconds as many as it takes"
    add("--faults", type=integer(0), help=faults)
    mtbf = "disturb one training until its last step, on average after so many seconds; prints its goodput"
    add("--mtbf-seconds", type=real(above=0), metavar="S", help=mtbf)
    kinds = (
        "faults to choose from: kill all, kill one, terminate, slow one, stop one, hold lock, full shm (of reading processes), "
        "lost run and artifacts away (of MLflow); default: all that apply"
    )
    add("--kinds", metavar="KINDS", type=lambda text: [kind.strip() for kind in text.split(",")], help=kinds)
    backend = "a file of recipes/backends, such as zero2, or a path; default: one process"
    add("--backend", metavar="NAME", help=backend)
    add("--processes", type=integer(1), help="number of processes; default: that of the backend file")
    patience = "maximum seconds of an undisturbed start; default: 3600"
    add("--patience", type=real(above=0), default=3600, help=patience)
    add("--seed", type=int, default=0, help="random seed of the faults; default: 0")
    add("--folder", type=Path, help="folder for the two runs; default: a temporary folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with and without faults. Returns the number of faults of each kind and the differences of the runs."""
    from vaescale.commands.chaos import chaos

    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    return chaos(options.pop("recipe"), **options)


def show(result: dict[str, Any]) -> None:
    """Print one line for each kind of fault and each comparison."""
    from vaescale.system.console import table

    rows = [(name, str(count)) for name, count in result["faults"].items()]
    rows += [(name, str(value)) for name, value in result.items() if name != "faults"]
    table("chaos", rows)


def exit_code(result: dict[str, Any]) -> int:
    """Return 0 when both runs are equal bit for bit, MLflow has all, and each end was explained; else 4."""
    lost = any(result.get(name) for name in ("rows_lost", "store_rows_lost", "store_files_lost"))
    return 0 if result["bit_equal"] and not lost and not result["unexplained"] else 4


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
