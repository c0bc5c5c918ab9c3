"""The processes of a distributed run, as the environment of a launcher or a cluster describes them. Pure functions.

Each cluster names the same few facts differently: how many nodes there are, which node this is, where the first node is,
and whether this process is one of the ranks already or has to start the ranks of its node.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vaescale.errors import UserError
from vaescale.system.slurm import components, nodes_of_step

DEFAULT_PORT = 29500  # torch's
# Of jobs that may share a node; below the ports that Linux gives to clients.
LEAST_PORT, NUM_PORTS = 20000, 10000
MOST_PORT = 65535
MOST_NUMBER = 2**32 - 1
TORCH_VARIABLES = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *(
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "GROUP_WORLD_SIZE",
            "ROLE_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ),
    )
)
LOOPBACK = "127.0.0.1"
SLURM_SHELLS = 0xFFFFFFF0  # Slurm numbers the steps of batch and interactive shells from the end of 32 bits
UNKNOWN = -1  # the number of a node that no variable tells


class World(NamedTuple):
    """Where this process stands in a distributed run.

    source: what described it, such as `Slurm job 12, step 0`. node of nodes: this machine's number, or UNKNOWN. ranks: what this process
    is to become: one rank, given by `rank`, or all the ranks of its node if `rank` is None. processes: ranks on each node if
    known (None: one for each GPU). address: the first node's name; None on a single node. joined: whether a launcher has set
    torch's own variables already. hosts: the nodes' names, if known. srun: whether `srun` must start one task on each node.
    note: what else to say of it.
    """

    source: str
    node: int = 0
    nodes: int = 1
    processes: int | None = None
    rank: int | None = None
    size: int | None = None
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int = DEFAULT_PORT
    hosts: tuple[str, ...] = ()
    joined: bool = False
    srun: bool = False
    note: str = ""

    @property
    def summary(self) -> str:
        """What this process understood, in a few words."""
        return self._place + (f" ({self.note})" if self.note else "")

    @property
    def _place(self) -> str:
        where = f"node {self.node} of {self.nodes}" + (f" ({self._host})" if self._host else "")
        if self.srun:
            return f"{self.source}: {self.nodes} node{'s'[: self.nodes > 1]}, which srun has yet to start"
        if self.rank is not None and self.nodes == 1 and self.size != self.local_size:
            return f"{self.source}: rank {self.rank} of {self.size}, {self.local_size} of them on this node"
        if self.rank is not None:
            return f"{self.source}: rank {self.rank} of {self.size} on {where}"
        return f"{self.source}: {where}" if self.nodes > 1 else f"{self.source}: one node"

    @property
    def _host(self) -> str:
        return self.hosts[self.node] if self.node < len(self.hosts) else ""


def read_world(environment: Mapping[str, str]) -> World:
    """Describe the distributed run that the environment belongs to. Raises UserError for contradictions in it."""
    for read in READERS:
        if (world := read(environment)) is not None:
            return world
    refuse_half_a_world(environment)
    return World("this machine")


def without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that tell a launcher or a rank its place, for a launcher that is told by arguments.

    torchrun, which accelerate calls, takes each PET_* as the default of an argument: with PET_NNODES=2 in a pod, two ranks on
    one machine would wait for a second machine.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("PET_", "TORCHELASTIC_")) and name not in TORCH_VARIABLES
    }


def unjoined(environment: Mapping[str, str]) -> World | None:
    """The world of several processes that started this one without telling torch, or None.

    A verb that begins without `vaescale launch` sees no other process then, although its cluster started several.
    """
    if "WORLD_SIZE" in environment:
        return None
    world = (
        _torchrun_variables(environment)
        or _open_mpi(environment)
        or _slurm_step(environment)
        or _hydra(environment)
    )
    return world if world is not None and (world.size or world.nodes) > 1 else None


def refuse_half_a_world(environment: Mapping[str, str]) -> None:
    """Raise UserError if some of the variables are missing with which torch finds the other processes, or contradict."""
    if "WORLD_SIZE" not in environment:
        return
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    size = _number(environment, "WORLD_SIZE", least=1)
    # WORLD_SIZE of a pod is not that of a rank, which a launcher in the pod has started.
    needed = (*names, *(("LOCAL_RANK",) if "PET_NNODES" in environment else ())) if size > 1 else ()
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start with "
            "`vaescale launch` or `accelerate launch`, or unset WORLD_SIZE to use one process"
        )
    if size > 1:
        _number(environment, "MASTER_PORT", least=1, most=MOST_PORT)
    if "RANK" in environment and not 0 <= _number(environment, "RANK") < size:
        raise UserError(f"RANK (={environment['RANK']}) must be below WORLD_SIZE (={size})")


def _joined(environment: Mapping[str, str]) -> World | None:
    """A rank that torchrun, accelerate or a similar launcher has started."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        return None
    refuse_half_a_world(environment)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, least=1)
    rank = _number(environment, "RANK")
    return World(
        "a launcher of torch's ranks",
        rank=rank,
        size=_number(environment, "WORLD_SIZE", least=1),
        local_rank=_number(environment, "LOCAL_RANK"),
        local_size=local_size,
        joined=True,
    )


def _torchrun_variables(environment: Mapping[str, str]) -> World | None:
    """PET_*, torchrun's arguments as variables: Kubeflow's TrainJob and PyTorchJob set them for each pod."""
    if "PET_NNODES" not in environment:
        return None
    nodes = _fixed_number(environment["PET_NNODES"])
    per_node = environment.get("PET_NPROC_PER_NODE", "auto")
    named = {"auto": None, "gpu": None, "cpu": 1}
    # TrainJob writes the index of the pod; an indexed job gives it under its own name, too.
    unsaid = 0 if nodes == 1 else UNKNOWN
    node = _number(environment, "PET_NODE_RANK", _number(environment, "JOB_COMPLETION_INDEX", unsaid))
    address = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    return World(
        "PET_* variables" + _of_a_pod(environment),
        node=node,
        nodes=nodes,
        processes=named[per_node]
        if per_node in named
        else _number(environment, "PET_NPROC_PER_NODE", least=1),
        address=address if nodes > 1 else None,
        port=_number(environment, "PET_MASTER_PORT", _number(environment, "MASTER_PORT", DEFAULT_PORT)),
    )


def _numbered_pods(environment: Mapping[str, str]) -> World | None:
    """Pods that RANK and WORLD_SIZE number, without LOCAL_RANK: an older PyTorchJob, or Volcano's plugin."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return None
    nodes = _number(environment, "WORLD_SIZE", least=1)
    return World(
        "RANK and WORLD_SIZE" + _of_a_pod(environment),
        node=_number(environment, "RANK"),
        nodes=nodes,
        address=environment["MASTER_ADDR"] if nodes > 1 else None,
        port=_number(environment, "MASTER_PORT", DEFAULT_PORT),
    )


def _skypilot(environment: Mapping[str, str]) -> World | None:
    """A node of a SkyPilot task. SKYPILOT_NODE_IPS has one address a line, that of node 0 first."""
    if "SKYPILOT_NODE_IPS" not in environment:
        return None
    hosts = tuple(environment["SKYPILOT_NODE_IPS"].split())
    nodes = _number(environment, "SKYPILOT_NUM_NODES", max(1, len(hosts)), least=1)
    gpus = _number(environment, "SKYPILOT_NUM_GPUS_PER_NODE", 0)
    return World(
        "SkyPilot",
        node=_number(environment, "SKYPILOT_NODE_RANK", 0 if nodes == 1 else UNKNOWN),
        nodes=nodes,
        processes=gpus or None,
        address=hosts[0] if nodes > 1 and hosts else None,
        hosts=hosts,
    )


def _of_a_pod(environment: Mapping[str, str]) -> str:
    return " of a Kubernetes job" if "KUBERNETES_SERVICE_HOST" in environment else ""


def _open_mpi(environment: Mapping[str, str]) -> World | None:
    """A task of Open MPI's mpirun."""
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    return _rank(
        environment,
        "Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    )


def _hydra(environment: Mapping[str, str]) -> World | None:
    """A task of MPICH's or Intel MPI's mpirun."""
    if not {"PMI_RANK", "PMI_SIZE"} <= environment.keys():
        return None
    return _rank(
        environment,
        "MPI",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
    )


def _slurm_step(environment: Mapping[str, str]) -> World | None:
    """A task that srun has started: a rank if a node has several tasks, else the launcher of its node's ranks."""
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        return None
    if _number(environment, "SLURM_STEP_ID") >= SLURM_SHELLS:
        return None
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    hosts, per_node = nodes_of_step(environment, tasks)
    node = _number(environment, "SLURM_NODEID", 0)
    if node >= len(per_node):
        raise UserError(
            f"SLURM_NODEID (={node}) must be below the number of nodes of the step (={len(per_node)})"
        )
    job, step = environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"]
    several = max(per_node) > 1
    # `srun -m arbitrary` places task 0 on any node.
    first = hosts[0] if hosts and not (several and _is_arbitrary(environment, per_node)) else None
    world = World(
        f"Slurm job {job}, step {step}",
        node=node,
        nodes=len(per_node),
        address=environment.get("MASTER_ADDR") or first,
        port=_number(environment, "MASTER_PORT", _port_of_job(job, step)),
        hosts=hosts,
        note=_unused_nodes(environment, len(per_node)),
    )
    if not several:
        return world
    return world._replace(
        rank=_number(environment, "SLURM_PROCID"),
        size=tasks,
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        local_size=per_node[node],
    )


def _unused_nodes(environment: Mapping[str, str], nodes: int) -> str:
    """What to say of a step on some of the components of a heterogeneous job."""
    parts = components(environment)
    total = sum(map(len, parts))
    if nodes >= total:
        return ""
    return f"{nodes} of the job's {total} nodes, `srun --het-group=0-{len(parts) - 1}` starts on all"


def _is_arbitrary(environment: Mapping[str, str], per_node: list[int]) -> bool:
    return len(per_node) > 1 and environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary")


def _slurm_batch(environment: Mapping[str, str]) -> World | None:
    """The shell of a Slurm job, before any srun: of sbatch or salloc."""
    if "SLURM_JOB_ID" not in environment:
        return None
    if _number(environment, "SLURM_STEP_ID", SLURM_SHELLS) < SLURM_SHELLS:
        return None
    older = _number(environment, "SLURM_NNODES", 1, least=1)
    nodes = sum(map(len, components(environment))) or _number(
        environment, "SLURM_JOB_NUM_NODES", older, least=1
    )
    several = nodes > 1 or _number(environment, "SLURM_NTASKS", 1) > 1
    # salloc may leave its shell on the login node, where no slurmd tells the node's name.
    elsewhere = "SLURMD_NODENAME" not in environment
    return World(f"Slurm job {environment['SLURM_JOB_ID']}", nodes=nodes, srun=several or elsewhere)


READERS: tuple[Callable[[Mapping[str, str]], World | None], ...] = (
    _joined,
    _torchrun_variables,
    _numbered_pods,
    _open_mpi,  # before Slurm: mpirun inside a Slurm job starts its daemons as a step
    _slurm_step,
    _slurm_batch,
    _hydra,  # after Slurm: srun sets PMI_RANK, too
    _skypilot,
)


def _rank(
    environment: Mapping[str, str], source: str, *, rank: str, size: str, local_rank: str, local_size: str
) -> World:
    """A task of mpirun, which does not say where the first one is: on one node that is this node."""
    number, tasks = _number(environment, rank), _number(environment, size, least=1)
    on_this_node = _number(environment, local_size, tasks, least=1)
    return World(
        source,
        rank=number,
        size=tasks,
        local_rank=_number(environment, local_rank, number),
        local_size=on_this_node,
        address=environment.get("MASTER_ADDR") or (LOOPBACK if on_this_node == tasks else None),
        port=_number(environment, "MASTER_PORT", DEFAULT_PORT),
    )


def _port_of_job(job: str, step: str) -> int:
    """A port that all tasks of a step compute alike and two jobs on one node seldom share."""
    digits = "".join(filter(str.isdecimal, job + step)) or "0"
    return LEAST_PORT + int(digits) % NUM_PORTS


def _fixed_number(text: str) -> int:
    """torchrun's number of nodes, which may be a range `1:4`."""
    least, _, most = text.partition(":")
    if not (re.fullmatch("[0-9]{1,9}", least) and (most or least) == least and int(least) >= 1):
        raise UserError(
            f"PET_NNODES (={text!r}) must be one whole number: a run keeps its number of nodes until it is started again"
        )
    return int(least)


def _number(
    environment: Mapping[str, str],
    name: str,
    default: int | None = None,
    *,
    least: int = 0,
    most: int = MOST_NUMBER,
) -> int:
    """A variable's whole number. Raises UserError if it is missing without a default, or is no such number."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        bound = f"from {least} to {most}" if most != MOST_NUMBER else f"of at least {least}"
        raise UserError(f"the environment variable {name} (={text!r}) must be a whole number {bound}")
    return int(text)
