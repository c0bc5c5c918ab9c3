"""Slurm: its short forms of lists, and what only the process itself shows of its place in a job."""

import contextlib
import re
from collections.abc import Mapping

import psutil

from vaescale.errors import UserError

MOST_HOSTS = 100_000
SHELLS = ("batch", "interactive")


def host_names(text: str) -> tuple[str, ...]:
    """The host names of a Slurm node list such as `n[1-2,7],login`, in order. Raises UserError for another form."""
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])*", text):
        raise UserError(f"the node list {text!r} has no form that Slurm writes, such as n[1-2,7]")
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else [n for one in ranges.split(",") for n in _range(one, text)]
            if len(expanded) * len(choices) > MOST_HOSTS:
                raise UserError(f"the node list {text!r} has more than {MOST_HOSTS} hosts")
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        hosts += expanded
    return tuple(hosts)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form `2(x3),1` as one number for each node. Raises UserError for another form."""
    numbers: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None or int(match[2] or 1) > MOST_HOSTS:
            raise UserError(
                f"the number of tasks per node {text!r} has no form that Slurm writes, such as 2(x3),1"
            )
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def components(environment: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The host names of each component of a heterogeneous job, in the order of the components; empty for another job.

    A shell or a job that was started within such a job inherits its variables, which then name another leader.
    """
    size, job = environment.get("SLURM_HET_SIZE", ""), environment.get("SLURM_JOB_ID")
    if not size.isdecimal() or int(size) < 2 or environment.get("SLURM_JOB_ID_HET_GROUP_0") != job:
        return []
    lists = [environment.get(f"SLURM_JOB_NODELIST_HET_GROUP_{number}", "") for number in range(int(size))]
    return [host_names(text) for text in lists]


def nodes_of_step(environment: Mapping[str, str], tasks: int) -> tuple[tuple[str, ...], list[int]]:
    """The host names of a step's nodes and the number of tasks on each, in the order of SLURM_NODEID.

    Slurm 22.05 sorts the hosts of SLURM_STEP_NODELIST by name, and numbers the nodes of a heterogeneous job by component.
    tasks: of the step, all of them on one node if no variable tells their nodes.
    """
    hosts = host_names(environment.get("SLURM_STEP_NODELIST", ""))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    if len(hosts) != len(per_node):
        return hosts, per_node
    number = dict(zip(hosts, per_node, strict=True))
    ordered = tuple(host for part in components(environment) for host in part if host in number)
    hosts = ordered if len(ordered) == len(hosts) else hosts
    return hosts, [number[host] for host in hosts]


def without_stale_step(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without the variables of a step, if this process belongs to a job's shell and not to a step.

    sbatch hands its own environment to the job. Typed within a step, such as `srun --pty bash`, it hands over SLURM_STEP_ID,
    SLURM_STEP_NUM_TASKS and others, which describe the step of another job then.
    """
    if "SLURM_STEP_ID" not in environment or _own_step() not in SHELLS:
        return environment
    return {name: value for name, value in environment.items() if not name.startswith("SLURM_STEP")}


def _own_step() -> str:
    """The Slurm step that this process belongs to, such as `0` or `batch`; empty if that cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for parent in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):  # processes of root may be hidden
                if found := re.match(r"slurmstepd: \[[^\]]*\.(\w+)\]", " ".join(parent.cmdline())):
                    return found[1]
    return ""


def _range(text: str, whole: str) -> list[str]:
    """`07-10` of a node list as `07`, `08`, `09`, `10`."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise UserError(f"the node list {whole!r} has no form that Slurm writes, such as n[1-2,7]")
    first, last = int(match[1]), int(match[2] or match[1])
    if last - first >= MOST_HOSTS:
        raise UserError(f"the node list {whole!r} has more than {MOST_HOSTS} hosts")
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
