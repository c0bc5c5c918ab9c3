"""The MLflow run that groups a sweep's runs, after somebody has deleted it."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.runs.tracked import client_at, make_run, steps_sent
from vaescale.runs import folder as run_folder
from vaescale.runs import parents
from vaescale.runs.mlflow import parent_run
from vaescale.runs.parents import PARENT, REPLACES
from vaescale.runs.tracking import TrackingConfig, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of themselves


@pytest.fixture
def parent(project: Path, config: TrackingConfig) -> str:
    made = parent_run(config.mlflow, config.experiment, "lr-sweep")
    assert made is not None
    return made


@pytest.fixture
def variant(config: TrackingConfig, parent: str) -> TrackingConfig:
    return config.model_copy(update={"parent": parent})


def parent_of(client: MlflowClient, state: dict[str, Any]) -> str:
    return str(client.get_run(state["run_id"]).data.tags[PARENT])


def test_a_deleted_parent_is_made_anew_once_and_linked(
    run: Path, project: Path, variant: TrackingConfig, parent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client, other = client_at(project), make_run(project / "runs" / "two")
    first, second = sync(run, variant, status="FINISHED"), sync(other, variant)
    assert parent_of(client, first) == parent_of(client, second) == parent
    client.delete_run(parent)
    run_folder.append_metrics(other, 3, {"train/mse": 0.1})
    sync(other, variant, status="FINISHED")
    made = client.get_run(parent_of(client, second))
    assert parent_of(client, first) == made.info.run_id != parent, "a run that has ended is linked, too"
    assert (made.info.run_name, made.info.status) == ("lr-sweep", "FINISHED")
    assert made.data.tags["sweep"] == "lr-sweep"
    assert made.data.tags[REPLACES] == parent
    assert steps_sent(client, second) == [1, 2, 3]
    for folder in (run, other, make_run(project / "runs" / "three")):
        assert parent_of(client, sync(folder, variant)) == made.info.run_id
    said = capsys.readouterr().err
    assert (
        said.count(f"{parent} that groups the runs of the sweep was deleted; {made.info.run_id} replaces")
        == 1
    )


def test_a_replacement_that_is_deleted_is_replaced(
    run: Path, project: Path, variant: TrackingConfig, parent: str
) -> None:
    client, other = client_at(project), make_run(project / "runs" / "two")
    state, seen = sync(run, variant), {parent}
    linked = sync(other, variant)
    for _ in range(2):
        client.delete_run(parent_of(client, state))
        sync(run, variant)
        seen.add(parent_of(client, state))
        assert parent_of(client, linked) == parent_of(client, state)
    assert len(seen) == 3


def test_a_parent_that_the_store_knows_no_more_is_replaced(
    run: Path, project: Path, variant: TrackingConfig, parent: str
) -> None:
    client = client_at(project)
    client._tracking_client.store._hard_delete_run(parent)  # as `mlflow gc` does
    made = client.get_run(parent_of(client, sync(run, variant)))
    assert made.info.run_name == "sweep"
    assert made.data.tags[REPLACES] == parent


def test_of_replacements_that_were_made_at_once_the_first_one_stays(
    run: Path,
    project: Path,
    variant: TrackingConfig,
    parent: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client, state = client_at(project), sync(run, variant)
    client.delete_run(parent)
    real, earlier = parents._replacement_of, list[str]()

    def made_after_another(*arguments: Any) -> str:
        earlier.append(real(*arguments))
        monkeypatch.setattr(parents, "_replacement_of", real)
        return real(*arguments)

    monkeypatch.setattr(parents, "_replacement_of", made_after_another)
    monkeypatch.setattr("time.time", lambda: 2e9 + len(earlier))  # MLflow counts in milliseconds
    sync(run, variant)
    assert [parent_of(client, state)] == earlier
    active, deleted = parents._replacements(client, state["experiment_id"], parent)
    assert (active, len(deleted)) == (earlier, 1)
    assert "replaces it" not in capsys.readouterr().err, "the process that made the first one says it"
