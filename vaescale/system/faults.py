"""Faults of processes, caused on purpose: killed, terminated, stopped, slow, or hung with Python's lock held."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HUNG_SECONDS = 3600
SLOW_SECONDS, SLOW_PERIOD = 4.0, 0.4  # a slow rank is stopped for half of each period
HOLD_LOCK = f'''"""Hang on SIGUSR2 with Python's lock held, so that no thread of this process runs any more."""
import ctypes, signal
signal.signal(signal.SIGUSR2, lambda *_: ctypes.PyDLL(None).sleep({HUNG_SECONDS}))
'''


class Family(NamedTuple):
    """The process that was started, all its descendants, and those among them that train."""

    first: int
    all: list[int]
    ranks: list[int]

    @classmethod
    def of(cls, process: int) -> "Family":
        """The family of a process as it is now. A process without a launcher is its only rank."""
        family = [process, *_descendants(process)]
        return cls(process, family, [one for one in family if _is_rank(one)] or [process])


def kill_all(family: Family) -> None:
    """Kill every process at once, as a node that loses its power."""
    for process in family.all:
        send(process, signal.SIGKILL)


def kill_one(family: Family) -> None:
    """Kill the last rank, as the kernel does when memory is short."""
    send(family.ranks[-1], signal.SIGKILL)


def terminate(family: Family) -> None:
    """Ask to stop, as a cluster does that wants its node back."""
    send(family.first, signal.SIGTERM)


def stop_one(family: Family) -> None:
    """Stop the last rank for good, as a hung device or file system does."""
    send(family.ranks[-1], signal.SIGSTOP)


def hold_lock(family: Family) -> None:
    """Hang the last rank while it holds Python's lock, as an extension that does not return. Needs `inject`."""
    send(family.ranks[-1], signal.SIGUSR2)


def slow_one(family: Family) -> None:
    """Halve the speed of the last rank for a while, then ask to stop."""
    end = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            send(family.ranks[-1], number)
            time.sleep(SLOW_PERIOD / 2)
    terminate(family)


FAULTS: dict[str, Callable[[Family], None]] = {
    "kill all": kill_all,
    "kill one": kill_one,
    "terminate": terminate,
    "slow one": slow_one,
    "stop one": stop_one,
    "hold lock": hold_lock,
}
NOTICED_BY_OTHERS = ("stop one", "hold lock")  # a process that is alone cannot tell that it hangs so


def inject(folder: Path) -> dict[str, str]:
    """Write what `hold_lock` needs into a folder. Returns the variables with which a process must be started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOLD_LOCK)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def send(process: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _descendants(process: int) -> list[int]:
    """The process ids of all descendants of a process; the most recently launched are at the end."""
    try:
        numbers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    children = [int(number) for number in numbers]
    return [*children, *(inner for child in children for inner in _descendants(child))]


def _is_rank(process: int) -> bool:
    """Whether a process is a rank of a launcher that trains, and not one of its readers."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in words and any(variable.startswith(b"RANK=") for variable in variables)
