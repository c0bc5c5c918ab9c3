"""Send to MLflow what a run could not send while it trained, or its metrics to another tracker. Nothing is sent twice.

vaescale sync runs/digits-optimal
vaescale sync runs/digits-optimal --to tensorboard; tensorboard --logdir runs
WANDB_MODE=offline vaescale sync runs/digits-optimal --to wandb
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder and the tracker."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    to = (
        "tracker: the recipe's MLflow store, RUN/tensorboard, Weights & Biases or trackio; the last three are packages of "
        "that name; default: mlflow"
    )
    parser.add_argument(
        "--to", choices=("mlflow", "tensorboard", "wandb", "trackio"), default="mlflow", help=to
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send what the tracker lacks. Returns the store, the run's id and the counts."""
    from vaescale.commands.sync import sync

    return sync(arguments.run, to=arguments.to)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
