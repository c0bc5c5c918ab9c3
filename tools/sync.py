"""Send to MLflow what a run could not send while it trained: metrics, figures, results. Nothing is sent twice."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send the rest. Returns where it went. Raises UserError when the store does not answer."""
    from vaescale.recipe import load_recipe
    from vaescale.runs import folder as run_folder
    from vaescale.runs.tracking import sync

    path = arguments.run / run_folder.RECIPE
    if not path.is_file():
        raise UserError(f"{arguments.run} is not a run folder (no {run_folder.RECIPE})")
    config = load_recipe(path).tracking
    if config.mlflow is None:
        raise UserError(
            f"{path} has tracking.mlflow: null; name a store there, such as sqlite:///runs/mlflow.db"
        )
    try:
        state = sync(arguments.run, config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {config.mlflow} does not answer ({error}); try again when it does"
        ) from error
    return {
        name: state[name]
        for name in ("tracking_uri", "experiment_id", "run_id", "metrics_sent", "artifacts_sent")
    }


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
