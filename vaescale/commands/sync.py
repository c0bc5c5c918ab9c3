"""Send to MLflow the rows and files that a run could not send while it trained. Imports no torch."""

from pathlib import Path
from typing import Any

from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs import tracking

RETURNED = ("tracking_uri", "experiment_id", "run_id", "metrics_sent", "artifacts_sent")


@checked
def sync(run: Path) -> dict[str, Any]:
    """Send metrics, figures and results that the run's MLflow store lacks. Returns the store, the run's id and the counts.

    Nothing is sent twice. Raises UserError when the run names no store, or the store does not answer.
    """
    path = run / run_folder.RECIPE
    if not path.is_file():
        raise UserError(f"{run} is not a run folder (no {run_folder.RECIPE})")
    config = load_recipe(path).tracking
    if config.mlflow is None:
        raise UserError(
            f"{path} has tracking.mlflow: null; name a store there, such as sqlite:///runs/mlflow.db"
        )
    try:
        state = tracking.sync(run, config)
    except UserError:
        raise
    except Exception as error:  # whatever a server or a network may raise
        raise UserError(f"MLflow at {config.mlflow} does not answer ({error}); try again later") from error
    return {name: state[name] for name in RETURNED}
