"""The other ranks of this host that do not answer: a rank that ends because of them ends them, too.

A stopped process does not act on SIGTERM. torch's launcher waits for it, `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` seconds (30 by default),
before it sends SIGKILL.
"""

import contextlib
import os
from collections.abc import Iterable

import psutil

from vaescale.system import exit_codes

GROUP = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")  # equal in all ranks of a launch

_given_up: set[int] = set()


def give_up(ranks: Iterable[int]) -> None:
    """Note ranks that do not answer, for `end_silent`."""
    _given_up.update(ranks)


def end_silent(code: int) -> list[int]:
    """Kill the ranks of `give_up` that run on this host, as the last act of this process, and leave `code` as theirs.

    Returns the killed ranks. They are found among the children of this process's launcher by the variables that it gave them;
    those of another host end with their own launcher.
    """
    if not _given_up:
        return []
    killed = []
    with contextlib.suppress(psutil.Error):
        for other in psutil.Process(os.getppid()).children():
            with contextlib.suppress(psutil.Error):
                rank = _rank_of(other) if other.pid != os.getpid() else None
                if rank in _given_up:
                    exit_codes.leave(code, rank=rank)
                    other.kill()
                    killed.append(rank)
    return sorted(killed)


def _rank_of(process: psutil.Process) -> int | None:
    """The rank of a process that the launcher of this one has started for the same training, else None."""
    variables = process.environ()
    same = all(variables.get(name) == os.environ.get(name) for name in GROUP)
    rank = variables.get("RANK", "")
    return int(rank) if same and rank.isdecimal() else None
