"""MLflow as a team runs it: PostgreSQL behind the server, artifacts on S3. Both are taken away while a run trains."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

from tests.launching import command, environment, make_project
from tests.mlflow_server import Server
from tests.services import KEYS, PASSWORD, S3, Postgres, missing, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # MLflow and boto3 warn of themselves
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}"),
]
STEPS = 1200
LONGEST_STEP_SECONDS = (
    10.0  # pictures and checkpoints take some; a request to a dead server would take 20 or more
)


class Services(NamedTuple):
    """A database, an S3 server and the MLflow server on both."""

    database: Postgres
    storage: S3
    server: Server

    def curve(self, run: Path, name: str) -> list[tuple[int, float]]:
        """What MLflow's database has of a metric; empty before the run is there."""
        run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
        return [
            (row.step, row.value) for row in MlflowClient(self.server.uri).get_metric_history(run_id, name)
        ]


MEET = """
import sys
from vaescale.runs.stores import be_patient, client_of, experiment_id, quiet
be_patient()
with quiet():
    print("ready", flush=True)
    sys.stdin.readline()
    uri = sys.argv[1]
    client = client_of(uri)
    print(client.create_run(experiment_id(client, uri, "tests")).info.run_id)
"""


def test_processes_that_meet_a_fresh_database_at_once_all_have_a_run() -> None:
    """As the tasks of a job array do; without the lock two of three fail on tables that exist."""
    database, started = Postgres(), []
    try:
        database.start()
        for _ in range(3):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", MEET, database.uri],
                    env=environment(PGPASSWORD=PASSWORD),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=240) for process in started]
        assert [process.returncode for process in started] == [0, 0, 0], [error for _, error in ended]
        stored = database.query("SELECT run_uuid FROM runs")
        assert {output.strip() for output, _ in ended} == {run for (run,) in stored}
        assert len(stored) == 3
    finally:
        for process in started:
            process.kill()
            process.communicate()
        database.remove()


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    database, storage = Postgres(), S3(tmp_path)
    server = Server(
        tmp_path,
        store=database.uri,
        words=("--artifacts-destination", f"s3://{storage.bucket}/mlflow"),
        environment=KEYS | {"PGPASSWORD": PASSWORD, "MLFLOW_S3_ENDPOINT_URL": storage.uri},
    )
    try:
        database.start()
        server.start()
        yield Services(database, storage, server)
    finally:
        server.kill()
        storage.kill()
        database.remove()


def rows_of(run: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_run_loses_nothing_when_database_and_storage_go_away(
    services: Services, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    project, run = make_project(tmp_path, digits), tmp_path / "runs" / "tracked"
    words = [
        f"run_dir={run}",
        f"training.steps={STEPS}",
        "training.log_every=1",
        "training.evaluate_every=300",
    ]
    words += [f"tracking.mlflow={services.server.uri}", "tracking.experiment=services"]
    with (tmp_path / "train.log").open("w") as log:
        training = subprocess.Popen(command(*words), cwd=project, env=environment(), stdout=log, stderr=log)
    try:
        # The storage is away at first: metrics arrive, artifacts wait.
        wait_until(lambda: services.curve(run, "train/mse"), seconds=120, what="no metric arrived")
        services.storage.start()
        services.database.kill()
        before = len(rows_of(run))
        wait_until(lambda: len(rows_of(run)) > before + 300, seconds=120, what="training did not go on")
        with pytest.raises(Exception, match="refused"):
            services.database.query("SELECT 1")
        services.database.start()
        assert training.wait(240) == 0, (tmp_path / "train.log").read_text()
    finally:
        training.kill()
        training.wait()

    rows = rows_of(run)
    assert max(row["step"] for row in rows) == STEPS
    times = [row["time"] for row in rows]
    assert max(after - at for at, after in itertools.pairwise(times)) < LONGEST_STEP_SECONDS
    state = json.loads((run / "mlflow.json").read_text())
    client = MlflowClient(services.server.uri)
    assert client.get_run(state["run_id"]).info.status == "FINISHED"
    for name in sorted({name for row in rows for name in row} - {"step", "time"}):
        expected = sorted((row["step"], row[name]) for row in rows if name in row)
        assert sorted(services.curve(run, re.sub(r"[^\w. :/-]", "_", name))) == expected, name
    stored = services.database.query("SELECT count(*) FROM metrics")[0][0]
    assert stored == sum(len(row) - 2 for row in rows), "in the database itself, each value once"
    runs = client.search_runs([state["experiment_id"]])
    assert [one.info.run_id for one in runs] == [state["run_id"]], "one run"

    sent = state["artifacts"]
    assert {"recipe.yaml", "summary.json", "figures/curves.png"} <= set(sent)
    for name in sent:
        copy = Path(client.download_artifacts(state["run_id"], name, str(tmp_path)))
        assert copy.read_bytes() == (run / name).read_bytes(), name
    listed = services.storage.client().list_objects_v2(Bucket=services.storage.bucket, Prefix="mlflow/")
    assert {one["Key"].partition("/artifacts/")[2] for one in listed["Contents"]} == set(sent)
