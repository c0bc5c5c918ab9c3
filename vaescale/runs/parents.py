"""The MLflow run that groups the runs of a sweep, made anew when somebody has deleted it."""

from typing import Any

from vaescale.system.console import say

PARENT = "mlflow.parentRunId"  # the tag by which MLflow groups runs
REPLACES = "vaescale.replaces"  # the tag that names a deleted run
MOST_RUNS = 1000  # of a page


def link_parent(client: Any, run: Any, parent: str) -> bool:
    """Link an MLflow run to its parent, or to the run that replaces a deleted parent. Returns whether the link was changed.

    parent: the id of the first one. Makes the replacement, and links the parent's other runs to it, if nobody did. Raises what
    MLflow raises.
    """
    living = _living(client, run.info.experiment_id, parent)
    if run.data.tags.get(PARENT) == living:
        return False
    client.set_tag(run.info.run_id, PARENT, living)
    return True


def _living(client: Any, experiment: str, parent: str) -> str:
    """The id of the run that groups the runs of a parent."""
    first = _run(client, parent)
    if first is not None and first.info.lifecycle_stage != "deleted":
        return parent
    active, deleted = _replacements(client, experiment, parent)
    if not active:
        made = _replacement_of(client, experiment, parent, first)
        active, deleted = _replacements(client, experiment, parent)
        if active[0] == made:
            say(
                f"the MLflow run {parent} that groups the runs of the sweep was deleted; {made} replaces it, and names it in the "
                f"tag {REPLACES}"
            )
    elif len(active) == 1:
        return active[0]
    # Of those that several processes made at once the first one stays.
    for surplus in active[1:]:
        client.delete_run(surplus)
    for before in (parent, *deleted, *active[1:]):
        for child in client.search_runs([experiment], f"tags.`{PARENT}` = '{before}'", max_results=MOST_RUNS):
            client.set_tag(child.info.run_id, PARENT, active[0])
    return active[0]


def _run(client: Any, run_id: str) -> Any:
    """A run of MLflow, or None if the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _replacements(client: Any, experiment: str, parent: str) -> tuple[list[str], list[str]]:
    """The ids of the runs that replace a parent, in one order for all processes: the active ones, and those that were deleted."""
    from mlflow.entities import ViewType

    runs = client.search_runs(
        [experiment],
        f"tags.`{REPLACES}` = '{parent}'",
        run_view_type=ViewType.ALL,
        max_results=MOST_RUNS,
    )
    active, deleted = list[str](), list[str]()
    for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)):
        (deleted if run.info.lifecycle_stage == "deleted" else active).append(run.info.run_id)
    return active, deleted


def _replacement_of(client: Any, experiment: str, parent: str, first: Any) -> str:
    """Make a run like the deleted parent. first: MLflow's, or None if the store knows it no more. Returns its id."""
    name = first.info.run_name if first is not None else "sweep"
    sweep = first.data.tags.get("sweep", name) if first is not None else name
    run = client.create_run(experiment, run_name=name, tags={"sweep": sweep, REPLACES: parent})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)
