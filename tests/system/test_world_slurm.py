"""Slurm's own environments, as slurmd 22.05.8 of Debian 12 gave them to processes on two nodes, n1 and n2.

slurm_environments.jsonl holds one for each way to start something, without addresses, paths and the user's name. Where a line
is a task of several, it is the last one's, or that of task 0 for `srun -m arbitrary`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vaescale.commands import launch
from vaescale.errors import UserError
from vaescale.system import slurm
from vaescale.system.world import World, read_world, unjoined
from vaescale.system.world_check import refuse_incomplete

LINES = (Path(__file__).parent / "slurm_environments.jsonl").read_text().splitlines()
ENVIRONMENTS: dict[str, dict[str, str]] = {
    line["kind"]: line["environment"] for line in map(json.loads, LINES)
}
TWO = ("n1", "n2")
# What each kind of process is: a shell that starts srun, a launcher of its node's ranks, or a rank.
EXPECTED: dict[str, dict[str, Any]] = {
    "sbatch": {"nodes": 1, "srun": False},
    "sbatch -N2": {"nodes": 2, "srun": True},
    "sbatch -n2": {"nodes": 1, "srun": True},
    "sbatch -N2 -n8": {"nodes": 2, "srun": True},
    "sbatch -N2 --gpus-per-node=2 -c4": {"nodes": 2, "srun": True},
    "sbatch of an array": {"nodes": 1, "srun": False},
    "sbatch of two components": {"nodes": 2, "srun": True},
    "sbatch of components on n3 and n[1-2]": {"nodes": 3, "srun": True},
    "salloc -N2": {"nodes": 2, "srun": True},
    "salloc -n2": {"nodes": 1, "srun": True},
    "salloc -N2, interactive step": {"nodes": 2, "srun": True},
    "salloc -n2, interactive step": {"nodes": 1, "srun": True},
    "srun of the interactive step": {"node": 1, "nodes": 2, "address": "n1", "hosts": TWO},
    "srun -N2": {"node": 1, "nodes": 2, "address": "n1", "hosts": TWO},
    "srun -n2": {"nodes": 1, "rank": 1, "size": 2, "local_rank": 1, "local_size": 2, "address": "n1"},
    "srun in sbatch -N2": {"node": 1, "nodes": 2, "address": "n1", "hosts": TWO},
    "srun in sbatch -N2 -n8": {"node": 1, "rank": 7, "size": 8, "local_rank": 0, "local_size": 1},
    "srun -m cyclic": {"node": 0, "rank": 2, "size": 3, "local_rank": 1, "local_size": 2, "address": "n1"},
    "srun -m arbitrary": {"node": 1, "rank": 0, "size": 3, "local_rank": 0, "local_size": 1, "address": None},
    "srun --exact -n1 in sbatch -n2": {"nodes": 1, "hosts": ("n1",)},
    "srun -N1 -w n2 in salloc -N2": {"nodes": 1, "hosts": ("n2",)},
    "srun --pty": {"nodes": 1, "hosts": ("n1",)},
    "srun -n2 --gpus-per-task=1": {"rank": 1, "size": 2, "local_rank": 1, "local_size": 2},
    "srun -N2 --gpus-per-node=2": {"node": 1, "nodes": 2, "hosts": TWO},
    "srun -N2 --gpu-bind=single:1": {"node": 1, "rank": 3, "size": 4, "local_rank": 1, "local_size": 2},
    "srun -n2 --gpus-per-node=2": {"rank": 1, "size": 2, "local_rank": 1, "local_size": 2},
    "srun --mpi=pmi2 -n2": {"rank": 1, "size": 2, "local_rank": 1, "local_size": 2},
    "srun --het-group=0,1": {"node": 1, "rank": 2, "size": 3, "local_rank": 1, "local_size": 2},
    # Slurm lists the nodes and their tasks by name, and numbers them by component.
    "srun --het-group=0,1, the first component on n3": {
        "node": 2,
        "nodes": 3,
        "address": "n3",
        "hosts": ("n3", "n1", "n2"),
        "rank": 6,
        "size": 7,
        "local_rank": 2,
        "local_size": 3,
    },
    "srun in sbatch of components, without --het-group": {
        "nodes": 1,
        "hosts": ("n3",),
        "address": "n3",
        "note": "1 of the job's 3 nodes, `srun --het-group=0-1` starts on all",
    },
}
SHELL_OF_ANOTHER_STEP = "sbatch -N2 typed within srun -N2"


def test_each_environment_has_its_expectation() -> None:
    assert {*EXPECTED, SHELL_OF_ANOTHER_STEP} == set(ENVIRONMENTS)


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_a_process_of_slurm_is(kind: str) -> None:
    world = read_world(ENVIRONMENTS[kind])
    defaults = {"srun": False} | ({} if "rank" in EXPECTED[kind] else {"rank": None, "size": None})
    assert {name: getattr(world, name) for name in defaults | EXPECTED[kind]} == defaults | EXPECTED[kind]
    assert world.source.startswith(f"Slurm job {ENVIRONMENTS[kind]['SLURM_JOB_ID']}")


@pytest.mark.parametrize("kind", EXPECTED)
def test_only_tasks_of_several_need_a_launcher(kind: str) -> None:
    several = EXPECTED[kind].get("size", 1) > 1 or (
        EXPECTED[kind].get("nodes", 1) > 1 and not EXPECTED[kind].get("srun")
    )
    assert (unjoined(ENVIRONMENTS[kind]) is not None) == several


def test_all_tasks_of_a_step_compute_one_port_and_a_new_step_another() -> None:
    task = ENVIRONMENTS["srun -N2"]
    ports = [read_world(task | {"SLURM_NODEID": node, "SLURM_PROCID": node}).port for node in "01"]
    assert ports[0] == ports[1] != read_world(task | {"SLURM_STEP_ID": "1"}).port
    assert read_world(task | {"MASTER_PORT": "4000"}).port == 4000


def test_task_0_of_an_arbitrary_distribution_is_anywhere() -> None:
    task = ENVIRONMENTS["srun -m arbitrary"]
    with pytest.raises(UserError, match="does not tell the address of the one with rank 0"):
        refuse_incomplete(read_world(task))
    assert read_world(task | {"MASTER_ADDR": "n2"}).address == "n2"


def test_a_shell_of_a_job_forgets_the_step_that_it_was_submitted_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inherited = ENVIRONMENTS[SHELL_OF_ANOTHER_STEP]
    assert unjoined(inherited), "the variables alone describe a task of two"
    monkeypatch.setattr(slurm, "_own_step", lambda: "batch")
    world = read_world(slurm.without_stale_step(inherited))
    assert (world.nodes, world.srun, world.rank) == (2, True, None)
    for step in ("0", ""):
        monkeypatch.setattr(slurm, "_own_step", lambda own=step: own)
        assert slurm.without_stale_step(inherited) == inherited


def test_this_process_belongs_to_no_step() -> None:
    assert slurm._own_step() == ""


@pytest.mark.parametrize(
    ("kind", "visible"),
    [
        ("srun -n2 --gpus-per-task=1", 1),
        ("srun -N2 --gpu-bind=single:1", 1),
        ("srun -n2 --gpus-per-node=2", 2),
        ("srun in sbatch -N2 -n8", 1),
        ("srun -m cyclic", 0),
    ],
)
def test_tasks_have_gpus_of_their_own(kind: str, visible: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "num_gpus", lambda: visible)
    launch._refuse_shared_gpus(read_world(ENVIRONMENTS[kind]), ENVIRONMENTS[kind])


def test_tasks_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ENVIRONMENTS["srun -n2 --gpus-per-node=2"]
    monkeypatch.setattr(launch, "num_gpus", lambda: 1)
    with pytest.raises(
        UserError, match=r"started 2 tasks on this node for 1 GPU: start one task for each GPU"
    ):
        launch._refuse_shared_gpus(read_world(tasks), tasks | {"SLURM_GPUS_ON_NODE": "1"})
    monkeypatch.setattr(launch, "num_gpus", lambda: 2)
    with pytest.raises(UserError, match="started 4 tasks on this node for 2 GPUs"):
        launch._refuse_shared_gpus(World("Slurm", rank=0, size=4, local_size=4), {})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sbatch -N2", "--ntasks=2 --ntasks-per-node=1"),
        ("salloc -N2", "--ntasks=2 --ntasks-per-node=1"),
        ("sbatch -n2", ""),
        ("salloc -N2, interactive step", ""),
        ("sbatch -N2 --gpus-per-node=2 -c4", ""),
    ],
)
def test_a_shell_starts_the_tasks_of_its_job(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ENVIRONMENTS[kind]
    monkeypatch.setattr(launch.os, "environ", environment)
    start = launch.plan(read_world(environment), ["train", "r.yaml"], processes=2)
    command = " ".join(start.command)
    assert command.startswith(f"srun --kill-on-bad-exit=1 {words} ".replace("  ", " "))
    assert command.endswith("-m vaescale launch --processes 2 --wait 300 train r.yaml")
    assert start.replaces
    assert start.variables == (
        {"SRUN_CPUS_PER_TASK": environment["SLURM_CPUS_PER_TASK"]} if "-c4" in kind or "step" in kind else {}
    )


def test_a_shell_of_a_heterogeneous_job_starts_one_step_on_all_components(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = ENVIRONMENTS["sbatch of components on n3 and n[1-2]"]
    monkeypatch.setattr(launch.os, "environ", environment)
    start = launch.plan(read_world(environment), ["train", "r.yaml"])
    command = " ".join(start.command)
    own = f"{sys.executable} -m vaescale launch --wait 300 train r.yaml"
    first = f"--het-group=0 --cpus-per-task=2 {own}"
    assert command == f"srun --kill-on-bad-exit=1 {first} : --het-group=1 {own}"
    assert start.variables == {}


def test_components_of_another_job_are_forgotten() -> None:
    inherited = ENVIRONMENTS["sbatch of components on n3 and n[1-2]"] | {"SLURM_JOB_ID": "40"}
    world = read_world(inherited)
    assert (world.nodes, world.srun) == (1, False)


def test_the_older_name_of_the_number_of_nodes_does(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ENVIRONMENTS["sbatch -N2"]
    environment = {name: value for name, value in kept.items() if name != "SLURM_JOB_NUM_NODES"}
    assert environment["SLURM_NNODES"] == "2"
    world = read_world(environment)
    assert world == read_world(kept)
    monkeypatch.setattr(launch.os, "environ", environment)
    assert "--ntasks=2" in launch.plan(world, ["train", "r.yaml"]).command
