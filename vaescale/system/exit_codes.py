"""Exit codes of ranks, which torch's launcher does not pass on: each rank leaves its code in a folder of `vaescale launch`."""

import contextlib
import os
import tempfile
from pathlib import Path

FOLDER = "VAESCALE_EXIT_CODES"
LOGS = "logs"  # torch's own folder, below that one
PREEMPTED = 75
NOTE = "vaescale-refused-"
REFUSED = 2  # recipe or arguments: the same command would be refused again


def leave(code: int, *, rank: int | None = None) -> int:
    """Leave this rank's exit code to its launcher, if `vaescale launch` started it. Returns the code to end with.

    That is 0 after a preemption: torch's launcher would print a traceback, and end ranks that still save. rank: another rank, for
    which this one leaves it.
    """
    folder = os.environ.get(FOLDER)
    if not folder or not code:
        return code
    try:
        (Path(folder) / (os.environ.get("RANK", "0") if rank is None else str(rank))).write_text(str(code))
    except OSError:
        return code
    return 0 if code == PREEMPTED else code


def remember_refusal(code: int) -> None:
    """Note that a start was refused, where torch's launcher would start the ranks again (`--max_restarts`)."""
    if code == REFUSED and (note := _note()) is not None:
        _forget_ended_launchers(note)
        with contextlib.suppress(OSError):
            descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(str(code))


def refused_before() -> int | None:
    """The exit code of an earlier attempt of the same launcher that was refused, None if there is none."""
    note = _note()
    if note is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    try:
        if note.lstat().st_uid != os.getuid():
            return None
        return int(note.read_text())
    except (OSError, ValueError):
        return None


def _forget_ended_launchers(note: Path) -> None:
    """Delete the notes of this user's launchers that have ended."""
    for other in note.parent.glob(f"{NOTE}{os.getuid()}-*"):
        launcher = other.name.removeprefix(NOTE).split("-")[1]
        if not Path("/proc", launcher).exists():
            with contextlib.suppress(OSError):
                other.unlink()


def _note() -> Path | None:
    """The file of a refusal, by the launcher's process; None where the launcher restarts nothing."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    try:
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # another system
        return None
    return Path(tempfile.gettempdir(), f"{NOTE}{os.getuid()}-{os.getppid()}-{started}")


def lets_others_end(code: int) -> bool:
    """Whether the launcher lets the other ranks end by themselves after one that ended with `code`."""
    return code == PREEMPTED and bool(os.environ.get(FOLDER))


def left_for(folder: str | None, rank: int) -> int | None:
    """The exit code that was left for a rank in a launcher's folder, or None."""
    with contextlib.suppress(OSError, ValueError):
        return int((Path(folder) / str(rank)).read_text()) if folder else None
    return None


def collect(folder: Path) -> int | None:
    """The smallest exit code that a rank left: a failure rather than a preemption. None if all ended with 0 or were killed."""
    codes = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError, ValueError):
            codes.append(int(file.read_text()))
    return min(codes, default=None)
