"""Send to MLflow what a run could not send while it trained: metrics, figures, results. Nothing is sent twice."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send the rest. Returns where it went, and how much."""
    from vaescale.commands.sync import sync

    return sync(arguments.run)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
