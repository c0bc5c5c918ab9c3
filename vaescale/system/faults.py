"""Faults of processes, caused on purpose: killed, terminated, stopped, slow, hung with Python's lock held, or without shared memory."""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

DAMAGES = ("flip a bit", "truncate")
HUNG_SECONDS = 3600
SLOW_SECONDS, SLOW_PERIOD = 4.0, 0.4  # a slow rank is stopped for half of each period
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SHARED_MEMORY_BYTES = 1 << 28  # of a process that has its own
CAUGHT_WITHIN = 30.0  # seconds in which a process that starts has its handlers
FULL_SECONDS = 60.0  # in which what is freed is filled again
POLL_SECONDS = 0.01
OWN_MOUNTS = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
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
    def of(cls, process: int, *, launched: bool = False) -> "Family":
        """The family of a process as it is now.

        launched: whether the process is a launcher, which has no rank at first; otherwise it is its only rank.
        """
        family = [process, *_descendants(process)]
        return cls(process, family, [one for one in family if _is_rank(one)] if launched else [process])


def kill_all(family: Family) -> None:
    """Kill every process at once, as a node that loses its power."""
    for process in family.all:
        send(process, signal.SIGKILL)


def kill_one(family: Family) -> None:
    """Kill the last rank, as the kernel does when memory is short."""
    send(family.ranks[-1], signal.SIGKILL)


def terminate(family: Family) -> None:
    """Ask to stop, as a cluster does that wants its node back."""
    # Before, a process ends without having done anything, and torch's launcher forgets ranks that it is just starting.
    for process in {family.first, *family.ranks}:
        _wait_until_caught(process, signal.SIGTERM)
    send(family.first, signal.SIGTERM)


def stop_one(family: Family) -> None:
    """Stop the last rank for good, as a hung device or file system does."""
    send(family.ranks[-1], signal.SIGSTOP)


def hold_lock(family: Family) -> None:
    """Hang the last rank while it holds Python's lock, as an extension that does not return. Needs `inject`."""
    _wait_until_caught(family.ranks[-1], signal.SIGUSR2)
    send(family.ranks[-1], signal.SIGUSR2)


def slow_one(family: Family) -> None:
    """Halve the speed of the last rank for a while, then ask to stop."""
    end = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            send(family.ranks[-1], number)
            time.sleep(SLOW_PERIOD / 2)
    terminate(family)


def fill_shared_memory(family: Family) -> None:
    """Keep the /dev/shm of a process full until the process has ended. Needs the words of `own_shared_memory` before its command.

    Waits until the process has a /dev/shm of its own: this machine's is never filled. The kernel frees it with its processes.
    """
    own = Path(f"/proc/{family.first}/root{SHARED_MEMORY}")
    machine = SHARED_MEMORY.stat().st_dev
    deadline = time.monotonic() + FULL_SECONDS
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
        while own.stat().st_dev == machine:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)
        descriptor = os.open(own / "full", os.O_CREAT | os.O_WRONLY)
        try:
            length = 0
            while runs(family.first) and time.monotonic() < deadline:
                state = os.fstatvfs(descriptor)
                free = state.f_bavail * state.f_frsize
                with contextlib.suppress(OSError):  # somebody else took some of it
                    if free:
                        os.posix_fallocate(descriptor, length, free)
                        length += free
                time.sleep(POLL_SECONDS)
        finally:
            os.close(descriptor)


FAULTS: dict[str, Callable[[Family], None]] = {
    "kill all": kill_all,
    "kill one": kill_one,
    "terminate": terminate,
    "slow one": slow_one,
    "stop one": stop_one,
    "hold lock": hold_lock,
    "full shm": fill_shared_memory,
}
NOTICED_BY_OTHERS = ("stop one", "hold lock")  # a process that is alone cannot tell that it hangs so
OF_A_RANK = ("kill one", "terminate", "slow one", *NOTICED_BY_OTHERS)  # a launcher must have started one


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, or truncate it. Returns which of the two."""
    kind = chance.choice(DAMAGES)
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return kind


def inject(folder: Path) -> dict[str, str]:
    """Write what `hold_lock` needs into a folder. Returns the variables with which a process must be started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOLD_LOCK)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


@functools.cache
def own_shared_memory() -> list[str] | None:
    """The words before a command that give its processes a small /dev/shm of their own; None where this user may not mount one."""
    mount = f'mount -t tmpfs -o size={SHARED_MEMORY_BYTES} vaescale-chaos {SHARED_MEMORY} && exec "$@"'
    for words in OWN_MOUNTS:
        command = [*words, "sh", "-c", mount, "sh"]
        if (
            shutil.which(words[0])
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return command
    return None


def kill_injected(folder: Path) -> None:
    """Kill every process that was started with the variables of `inject`, in whatever session a launcher has put it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in process.environ().get("PYTHONPATH", "").split(os.pathsep):
                process.kill()


def runs(process: int) -> bool:
    """Whether a process runs, and is not a zombie that waits for its parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def send(process: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _wait_until_caught(process: int, number: signal.Signals) -> None:
    """Wait until a process has a handler for a signal, for at most CAUGHT_WITHIN seconds."""
    deadline = time.monotonic() + CAUGHT_WITHIN
    while runs(process) and time.monotonic() < deadline and not _is_caught(process, number):
        time.sleep(POLL_SECONDS)


def _is_caught(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc_pid_status(5), SigCgt)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


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
