"""The worlds of pods and of MPI's tasks. Pods: the variables that the controllers' sources inject (Kubeflow Trainer 2.3.0,
training operator 1.9, kubernetes-sigs/jobset of August 2026). MPI: recorded from Open MPI 4.1.4 and MPICH 4.0.2 on Debian 12.
"""

from typing import Any

import pytest

from vaescale.commands.launch import Start, _with, plan
from vaescale.errors import UserError
from vaescale.system.world import (
    World,
    read_world,
    refuse_half_a_world,
    unjoined,
    without_launchers,
)
from vaescale.system.world_check import refuse_incomplete

POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_SERVICE_PORT": "443",
    "HOSTNAME": "digits-node-0-1",
}
CALL = ["train", "recipe.yaml"]


def trainjob(node: int, nodes: int = 2, processes: str = "4") -> dict[str, str]:
    """Two nodes of a TrainJob `digits`; JobSet's Jobs are indexed ones."""
    return POD | {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": processes,
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "digits-node-0-0.digits",
        "PET_MASTER_PORT": "29500",
        "JOB_COMPLETION_INDEX": str(node),
    }


def pytorchjob(node: int) -> dict[str, str]:
    """One master and one worker with four processes each. WORLD_SIZE counts processes, RANK counts pods."""
    return POD | {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": "23456",
        "PET_MASTER_PORT": "23456",
        "MASTER_ADDR": "digits-master-0",
        "PET_MASTER_ADDR": "digits-master-0",
        "WORLD_SIZE": "8",
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": "4",
        "PET_NNODES": "2",
    }


def older_pytorchjob(node: int) -> dict[str, str]:
    """Before PET_*, as Volcano's plugin still does: WORLD_SIZE and RANK count pods."""
    return POD | {
        "PYTHONUNBUFFERED": "0",
        "MASTER_PORT": "23456",
        "MASTER_ADDR": "digits-master-0",
        "WORLD_SIZE": "2",
        "RANK": str(node),
    }


def jobset(node: int) -> dict[str, str]:
    """JobSet injects nothing; recipes/kubernetes/jobset.yaml sets PET_*, and the Job its index."""
    return POD | {
        "PET_NNODES": "2",
        "PET_MASTER_ADDR": "vaescale-node-0-0.vaescale",
        "JOB_COMPLETION_INDEX": str(node),
    }


def skypilot(node: int) -> dict[str, str]:
    return {
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }


def open_mpi(rank: int, *, local: int = 2) -> dict[str, str]:
    """One of two tasks of `mpirun -n 2`, those variables that could mislead included."""
    return {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local),
        "OMPI_COMM_WORLD_NODE_RANK": str(rank % local),
        "OMPI_UNIVERSE_SIZE": "2",
        "OMPI_FIRST_RANKS": "0",
        "OMPI_MCA_orte_num_nodes": str(2 // local),
        "OMPI_MCA_orte_hnp_uri": "1439498240.0;tcp://192.0.2.2:35723",
        "PMIX_RANK": str(rank),
        "PMIX_NAMESPACE": "1439498241",
        "PMIX_HOSTNAME": "a",
    }


def mpich(rank: int, *, local: int = 2) -> dict[str, str]:
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": "2",
        "PMI_FD": "6",
        "HYDI_CONTROL_FD": "7",
        "MPI_LOCALNRANKS": str(local),
        "MPI_LOCALRANKID": str(rank % local),
        "MPIR_CVAR_CH3_INTERFACE_HOSTNAME": "a",
    }


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(
    ("environment", "processes", "address", "port"),
    [
        (trainjob, 4, "digits-node-0-0.digits", 29500),
        (pytorchjob, 4, "digits-master-0", 23456),
        (older_pytorchjob, None, "digits-master-0", 23456),
        (jobset, None, "vaescale-node-0-0.vaescale", 29500),
        (skypilot, 8, "10.0.0.7", 29500),
    ],
)
def test_a_pod_starts_the_ranks_of_its_node(
    environment: Any, processes: int | None, address: str, port: int, node: int
) -> None:
    world = read_world(environment(node))
    refuse_incomplete(world)
    assert world.rank is None
    assert (world.node, world.nodes, world.processes) == (node, 2, processes)
    assert (world.address, world.port) == (address, port)
    assert f"node {node} of 2" in world.summary
    command = started(world, processes=2).command
    assert words_after(command, "--num_machines") == "2"
    assert words_after(command, "--num_processes") == "4"
    assert words_after(command, "--machine_rank") == str(node)
    assert words_after(command, "--main_process_ip") == address
    assert words_after(command, "--main_process_port") == str(port)


def started(world: World, *, processes: int | None = None) -> Start:
    return plan(world, CALL, processes=processes)


def words_after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize("processes", ["auto", "gpu", "cpu", "1"])
def test_one_pod_trains_in_one_process(processes: str) -> None:
    world = read_world(trainjob(0, nodes=1, processes=processes))
    refuse_incomplete(world)
    assert started(world).command[1:] == ["-m", "vaescale", *CALL]


def test_an_indexed_job_without_a_number_of_nodes_is_many_lone_tasks() -> None:
    world = read_world(POD | {"JOB_COMPLETION_INDEX": "3"})
    assert (world.node, world.nodes, world.rank) == (0, 1, None)


@pytest.mark.parametrize("environment", [open_mpi, mpich])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_task_of_mpirun_is_a_rank(environment: Any, rank: int) -> None:
    world = read_world(environment(rank))
    refuse_incomplete(world)
    start = started(world)
    assert start.replaces
    told = {name: start.variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert told == {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    refuse_half_a_world(told | {"MASTER_PORT": "29500"})


@pytest.mark.parametrize("environment", [open_mpi, mpich])
def test_mpirun_over_several_nodes_needs_an_address(environment: Any) -> None:
    variables = environment(1, local=1)
    with pytest.raises(UserError, match="does not tell the address of the one with rank 0"):
        refuse_incomplete(read_world(variables))
    refuse_incomplete(_with(read_world(variables), address="a"))
    world = read_world(variables | {"MASTER_ADDR": "a"})
    refuse_incomplete(world)
    assert (world.rank, world.local_rank, world.local_size, world.address) == (1, 0, 1, "a")
    assert "rank 1 of 2, 1 of them on this node" in world.summary


def test_what_no_variable_tells_can_be_said() -> None:
    elastic = POD | {
        "PET_NNODES": "2:2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "digits-worker-0:23456",
    }
    with pytest.raises(UserError, match="no variable tells which one this is"):
        refuse_incomplete(read_world(elastic))
    with pytest.raises(UserError, match="address of node 0"):
        refuse_incomplete(_with(read_world(elastic), node=1))
    refuse_incomplete(_with(read_world(elastic), node=1, address="digits-worker-0"))
    with pytest.raises(UserError, match="must be one whole number"):
        read_world(elastic | {"PET_NNODES": "1:4"})
    with pytest.raises(UserError, match="must be below the number of nodes"):
        refuse_incomplete(read_world(trainjob(2)))


@pytest.mark.parametrize(
    "environment", [trainjob(1), pytorchjob(1), older_pytorchjob(1), open_mpi(1), mpich(1), skypilot(1)]
)
def test_a_launcher_sees_nothing_of_where_it_is(environment: dict[str, str]) -> None:
    kept = without_launchers(environment | {"PATH": "/bin", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"})
    assert not any(name.startswith("PET_") for name in kept)
    assert not kept.keys() & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert {"PATH", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"} <= kept.keys()


@pytest.mark.parametrize("environment", [trainjob, jobset, pytorchjob])
def test_training_without_launch_says_what_it_needs(environment: Any) -> None:
    alone = {name: value for name, value in environment(0).items() if name != "WORLD_SIZE"}
    world = unjoined(alone)
    assert world is not None
    assert world.nodes == 2
    # A rank that torchrun or accelerate started in such a pod has all it needs.
    assert unjoined(environment(0) | {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"}) is None


def test_training_in_a_pod_of_a_pytorchjob_needs_a_launcher() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is not set: start with `vaescale launch`"):
        refuse_half_a_world(pytorchjob(0))
    refuse_half_a_world(pytorchjob(0) | {"LOCAL_RANK": "0"})
