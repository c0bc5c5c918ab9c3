"""Distributed runs as environments describe them: one machine, launchers of torch's ranks, and contradictions."""

import pytest

from vaescale.errors import UserError
from vaescale.system.slurm import MOST_HOSTS, host_names, tasks_per_node
from vaescale.system.world import read_world, refuse_half_a_world, unjoined

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}


def test_without_a_cluster_there_is_one_node() -> None:
    world = read_world({"HOME": "/root", "PATH": "/bin"})
    assert (world.nodes, world.rank, world.processes, world.joined) == (1, None, None, False)
    assert world.summary == "this machine: one node"


def test_a_rank_of_torchrun_is_joined() -> None:
    world = read_world(RANK | MASTER | {"SLURM_JOB_ID": "7", "PET_NNODES": "1"})
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert world.joined


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-[001-002].example", ["gpu-001.example", "gpu-002.example"]),
        ("", []),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert list(host_names(text)) == hosts


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n[1-2", f"n[0-{MOST_HOSTS}]", "a[1-1000]b[1-1000]"])
def test_an_odd_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the node list"):
        host_names(text)


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("7,1") == [7, 1]
    for text in ("2x3", "", "2(x9999999)", "-1"):
        with pytest.raises(UserError, match="tasks per node"):
            tasks_per_node(text)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "first"}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE (='two') must be a whole number of at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MASTER}, r"RANK (=2) must be below WORLD_SIZE (=2)"),
        ({"WORLD_SIZE": "2", "RANK": "-1", **MASTER}, "RANK (='-1')"),
    ],
)
def test_half_a_world_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_half_a_world(environment)
    assert sentence in str(refused.value)


def test_a_whole_world_or_none_is_not() -> None:
    for environment in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", "RANK": "1", **MASTER}):
        refuse_half_a_world(environment)


def test_tasks_that_do_not_know_each_other() -> None:
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "n1",
    }
    assert (world := unjoined(task)) is not None
    assert world.size == 2
    assert unjoined(task | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None
    assert unjoined(task | {"WORLD_SIZE": "2"}) is None, "something told torch"
    assert unjoined({}) is None
