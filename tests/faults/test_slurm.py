"""The jobs of recipes/slurm on a real slurmctld and two slurmd: preempted, cancelled, cut off, as an array.

Runs where Debian's slurmctld, slurmd, slurm-client and munge are installed, and only as root, in about six minutes on two cores.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launching import RECIPE, checkpoints, curve, make_project
from tests.slurm_cluster import Cluster, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        "VAESCALE_SLURM_TESTS" not in os.environ,
        reason="starts daemons of Slurm for minutes: set VAESCALE_SLURM_TESTS=1",
    ),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
STEPS = 60
OPTIONS = (
    "tracking.mlflow=null",
    *("training.precision=fp32", "training.log_every=1", f"training.steps={STEPS}"),
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
NODES = ("--nodes=2",)
TASKS = ("--nodes=1", "--ntasks-per-node=2")
WATCHDOG_SECONDS = 6


class Site(NamedTuple):
    """A cluster, and a project's folder that all its nodes see."""

    cluster: Cluster
    folder: Path

    def submit(self, name: str, *options: str, more: tuple[str, ...] = ()) -> int:
        """Submit recipes/slurm/train.sbatch on the digits, to run folder NAME. `more`: options of launch, or recipe keys."""
        ahead = [word for word in more if "=" not in word]
        keys = [word for word in more if "=" in word]
        words = [*ahead, RECIPE, *OPTIONS, *keys, f"run_dir={self.folder / name}"]
        script = "recipes/slurm/train.sbatch"
        options = (f"--output={self.folder}/{name}.log", "--gpus-per-node=0", "--cpus-per-task=1", *options)
        return self.cluster.submit(*options, script, *words, cwd=self.folder, more={"OMP_NUM_THREADS": "1"})

    def wait_for_rows(self, name: str, rows: int) -> None:
        """Wait until a run has written some training rows."""
        deadline = time.monotonic() + 120
        while len(curve(self.folder / name)) < rows:
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.05)

    def said(self, name: str) -> str:
        """What a job printed."""
        log = self.folder / f"{name}.log"
        return log.read_text() if log.exists() else ""

    def numbers(self, name: str) -> tuple[list[dict[str, float]], dict[str, str]]:
        """The training rows of a run, and the sums of its last checkpoint's tensors."""
        run = self.folder / name
        rows = [{key: row[key] for key in row if key.startswith("train/")} for row in curve(run)]
        manifest = run / "checkpoints" / checkpoints(run)[-1] / "manifest.json"
        files = json.loads(manifest.read_text())["files"]
        return rows, {file: files[file]["sha256"] for file in files if file.endswith(".safetensors")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Site]:
    folder = make_project(tmp_path_factory.mktemp("slurm"), digits)
    short = Path(tempfile.mkdtemp(prefix="vs", dir="/tmp"))
    try:
        with Cluster(short, slurmd_timeout=10, kill_wait=10) as cluster:
            yield Site(cluster, folder)
    finally:
        shutil.rmtree(short)


@pytest.fixture(scope="module")
def peace(site: Site) -> tuple[list[dict[str, float]], dict[str, str]]:
    """What a job of two nodes ends with that nobody disturbs."""
    job = site.submit("peace", *NODES)
    assert site.cluster.wait(job, *ENDED)["JobState"] == "COMPLETED", site.said("peace")
    return site.numbers("peace")


@pytest.mark.parametrize(
    ("name", "layout", "action"),
    [
        ("requeued", NODES, ("scontrol", "requeue")),
        ("signalled", NODES, ("scancel", "--signal=TERM")),  # what --signal=TERM@180 does
        ("tasks", TASKS, ("scancel", "--signal=USR1")),
        ("launchers", NODES, ("scancel", "--signal=USR1")),
    ],
)
def test_a_preempted_job_ends_as_if_undisturbed(
    name: str,
    layout: tuple[str, ...],
    action: tuple[str, ...],
    site: Site,
    peace: tuple[list[dict[str, float]], dict[str, str]],
) -> None:
    job = site.submit(name, *layout)
    site.wait_for_rows(name, 15)
    site.cluster.run(*action, str(job))
    ended = site.cluster.wait(job, *ENDED)
    said = site.said(name)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert "asked to stop after step" in said
    assert "Exited with exit code 75" in said
    assert "Terminated" not in said, said
    assert "Traceback" not in said
    rows, tensors = site.numbers(name)
    assert len(rows) == STEPS
    assert rows == peace[0]
    assert tensors == peace[1]


COMPONENT = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0")


@pytest.mark.parametrize(
    ("name", "layout", "more"),
    [
        ("four", NODES, ("--processes", "2")),
        # Slurm lists the nodes of a step by name, and numbers them by component.
        ("components", ("--nodelist=n2", *COMPONENT, ":", "--nodelist=n1", *COMPONENT), ()),
    ],
)
def test_other_layouts_train_the_same_curve(
    name: str,
    layout: tuple[str, ...],
    more: tuple[str, ...],
    site: Site,
    peace: tuple[list[dict[str, float]], dict[str, str]],
) -> None:
    job = site.submit(name, *layout, more=more)
    site.wait_for_rows(name, 15)
    site.cluster.run("scancel", "--signal=TERM", str(job))
    ended = site.cluster.wait(job, *ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.said(name)
    rows = site.numbers(name)[0]
    assert len(rows) == STEPS
    for own, other in zip(rows, peace[0], strict=True):
        for key in ("train/neg_elbo_nats", "train/sigma"):
            assert own[key] == pytest.approx(other[key], rel=1e-4)


def test_a_cancelled_job_saves_and_does_not_come_back(site: Site) -> None:
    job = site.submit("cancelled", *NODES)
    site.wait_for_rows("cancelled", 10)
    site.cluster.run("scancel", str(job))
    site.cluster.wait(job, *ENDED)
    time.sleep(1)
    ended = site.cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), site.said("cancelled")
    assert json.loads((site.folder / "cancelled/stopped.json").read_text())["exit_code"] == 75


def test_tasks_without_a_launcher_end_with_one_sentence(site: Site) -> None:
    words = ["srun", "-n2", "vaescale", "train", RECIPE, *OPTIONS, "run_dir=alone"]
    said = site.cluster.run(*words, cwd=site.folder, check=False)
    sentences = [line for line in said.splitlines() if line.startswith("vaescale")]
    assert len(sentences) == 2, said  # one from each task
    assert "started 2 tasks, which do not know each other: type `vaescale launch`" in sentences[0]
    assert "Traceback" not in said
    assert not (site.folder / "alone").exists()


def test_a_node_that_does_not_come_is_named(site: Site) -> None:
    launch = f"vaescale launch --wait 12 {RECIPE}"
    script = f'test "$SLURM_NODEID" = 1 && exec sleep 60; {launch}'
    begun = time.monotonic()
    said = site.cluster.run(
        "srun", "-N2", "--kill-on-bad-exit=1", "sh", "-c", script, cwd=site.folder, check=False
    )
    assert "waiting for node 1 (n2) of 2" in said
    assert "vaescale launch: node 1 (n2) of 2 did not come within 12 s to node 0 (n1), port" in said, said
    assert time.monotonic() - begun < 40


def test_an_array_trains_the_variants_of_a_sweep(site: Site) -> None:
    words = ["vaescale", "sweep", RECIPE, "seed=0,1", *OPTIONS, "--name", "two", "--write", "slurm"]
    site.cluster.run(*words, cwd=site.folder)
    script = "runs/two/sweep.sbatch"
    options = ["--gpus-per-node=0", f"--output={site.folder}/two-%a.log"]
    job = site.cluster.submit(*options, script, cwd=site.folder, more={"OMP_NUM_THREADS": "1"})
    runs = [f"runs/two-seed-{seed}" for seed in (0, 1)]
    site.wait_for_rows(runs[1], 10)
    site.cluster.run("scancel", "--signal=TERM", f"{job}_1")
    ended = [site.cluster.wait(f"{job}_{seed}", *ENDED) for seed in (0, 1)]
    said = site.said("two-0") + site.said("two-1")
    assert [(one["JobState"], one["Restarts"]) for one in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ], said
    assert [len(curve(site.folder / run)) for run in runs] == [STEPS, STEPS]
    compared = site.cluster.run("vaescale", "compare-runs", "runs/two", "--json", cwd=site.folder)
    assert all(Path(run).name in compared for run in runs)


def test_a_node_that_is_cut_off_is_named(
    site: Site, peace: tuple[list[dict[str, float]], dict[str, str]]
) -> None:
    more = ("training.checkpoint_every=10", f"training.watchdog_seconds={WATCHDOG_SECONDS}")
    job = site.submit("cut", *NODES, more=more)
    site.wait_for_rows("cut", 25)
    begun = time.monotonic()
    with site.cluster.without("n2"):
        while "no sign of life" not in site.said("cut") and time.monotonic() < begun + 60:
            time.sleep(0.1)
        assert "rank 1 not heard from" in site.said("cut"), site.said("cut")
        assert time.monotonic() - begun < WATCHDOG_SECONDS + 5
    ended = site.cluster.wait(job, *ENDED)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), site.said("cut")
    job = site.submit("cut", *NODES, more=more)
    assert site.cluster.wait(job, *ENDED)["JobState"] == "COMPLETED", site.said("cut")
    assert site.numbers("cut")[0] == peace[0]


def test_a_job_goes_on_when_its_lost_node_is_back(
    site: Site, peace: tuple[list[dict[str, float]], dict[str, str]]
) -> None:
    more = ("training.checkpoint_every=10",)
    job = site.submit("lost", *NODES, more=more)
    site.wait_for_rows("lost", 25)
    with site.cluster.without("n2"):  # longer than SlurmdTimeout, shorter than the watchdog's bound
        deadline = time.monotonic() + 120
        while site.cluster.job(job)["Restarts"] != "1":
            assert time.monotonic() < deadline, site.said("lost")
            time.sleep(0.2)
        assert "Node failure on n2" in site.said("lost")
    ended = site.cluster.wait(job, *ENDED, seconds=180)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.said("lost")
    assert site.numbers("lost")[0] == peace[0]
