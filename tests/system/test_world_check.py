"""Worlds that cannot exist: each is one sentence with the value."""

import pytest

from vaescale.errors import UserError
from vaescale.system.world import World, read_world
from vaescale.system.world_check import refuse_incomplete

PODS = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_LOCALID": "1",
}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "2345"}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (PODS | {"PET_NNODES": "1000000000"}, "PET_NNODES (='1000000000') must be one whole number"),
        (PODS | {"PET_NNODES": "200000"}, "the number of nodes (=200000) must be at most 100000"),
        (PODS | {"PET_NNODES": "9" * 5000}, "must be one whole number"),
        (PODS | {"PET_NODE_RANK": "9" * 5000}, "PET_NODE_RANK"),
        (PODS | {"PET_NNODES": "\N{ARABIC-INDIC DIGIT TWO}"}, "must be one whole number"),
        (PODS | {"PET_MASTER_PORT": "0"}, "PET_* variables: the port (=0) must be from 1 to 65535"),
        (PODS | {"PET_MASTER_PORT": "99999"}, "the port (=99999) must be from 1 to 65535"),
        (PODS | {"PET_MASTER_ADDR": "first:29500"}, "(='first:29500') must be a name or an address alone"),
        (PODS | {"PET_MASTER_ADDR": "[::1]"}, "an address of IPv6 without brackets"),
        (
            MPI | {"OMPI_COMM_WORLD_RANK": "5"},
            "Open MPI: the rank (=5) must be below the number of ranks (=2)",
        ),
        (MPI | {"MASTER_PORT": "70000"}, "Open MPI: the port (=70000)"),
        ({"PMI_RANK": "3", "PMI_SIZE": "2"}, "MPI: the rank (=3)"),
        (STEP | {"SLURM_PROCID": "7"}, "Slurm job 7, step 0: the rank (=7)"),
        (STEP | {"SLURM_LOCALID": "7"}, "the rank on this node (=7) must be below their number (=2)"),
        (RANK | {"MASTER_PORT": "x"}, "MASTER_PORT (='x') must be a whole number from 1 to 65535"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT are not set"),
    ],
)
def test_what_cannot_exist_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_incomplete(read_world(environment))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("environment", [PODS, MPI, STEP, RANK, PODS | {"PET_MASTER_ADDR": "fd00::1"}])
def test_what_can_exist_is_not(environment: dict[str, str]) -> None:
    refuse_incomplete(read_world(environment))


def test_a_variable_of_one_process_describes_no_world() -> None:
    for environment in ({"LOCAL_RANK": "0"}, {"RANK": "0"}, {"WORLD_SIZE": "1"}):
        assert read_world(environment) == World("this machine")
