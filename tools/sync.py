"""Send to MLflow the metrics, figures and results that a run could not send while it trained. Nothing is sent twice."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send what the store lacks. Returns the store, the run's id and the counts."""
    from vaescale.commands.sync import sync

    return sync(arguments.run)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
