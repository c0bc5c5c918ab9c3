"""Send to MLflow what a run could not send while it trained, or its metrics to another tracker. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from vaescale.commands.signature import checked
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.runs import folder as run_folder
from vaescale.runs import tracking
from vaescale.runs.drains import Described, drain
from vaescale.runs.mlflow_state import final_status
from vaescale.runs.store_faults import StoreFault
from vaescale.system.console import say
from vaescale.system.secrets import redact

RETURNED = ("tracking_uri", "experiment_id", "run_id", "metrics_sent", "artifacts_sent")


@checked
def sync(run: Path, *, to: Literal["mlflow", "tensorboard", "wandb", "trackio"] = "mlflow") -> dict[str, Any]:
    """Send metrics, figures and results that the run's MLflow store lacks. Returns the store, the run's id and the counts.

    to: another tracker than MLflow gets the metrics (TensorBoard the figures, too), see `runs/drains.py`. Nothing is sent twice. A run that was killed, so that its store shows it as running, gets the status that its folder tells.
    Raises UserError when the run names no store, or the store does not take all.
    """
    run_folder.refuse_other(run)
    recipe = load_recipe(run / run_folder.RECIPE)
    config = recipe.tracking
    if to != "mlflow":
        return drain(Described(run, recipe.name, config.experiment, recipe.public()), to)
    if config.mlflow is None:
        raise UserError(
            f"{run / run_folder.RECIPE} has tracking.mlflow: null; name a store there, such as sqlite:///runs/mlflow.db"
        )
    status, ended_ms = final_status(run, recipe.training.steps)
    say(f"sync {run} to {redact(config.mlflow)}")
    try:
        state = tracking.sync(run, config, status=status, ended_ms=ended_ms)
    except StoreFault as fault:
        later = "; try again later" if fault.passes else ""
        raise UserError(f"{fault.sentence(config.mlflow)}{later}") from fault
    return {name: state[name] for name in RETURNED}
