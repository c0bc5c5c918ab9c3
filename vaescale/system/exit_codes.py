"""Exit codes of ranks, which torch's launcher does not pass on: each rank leaves its code in a folder of `vaescale launch`."""

import contextlib
import os
from pathlib import Path

FOLDER = "VAESCALE_EXIT_CODES"
LOGS = "logs"  # torch's own folder, below that one
PREEMPTED = 75


def leave(code: int) -> int:
    """Leave this rank's exit code to its launcher, if `vaescale launch` started it. Returns the code to end with.

    That is 0 after a preemption: torch's launcher would print a traceback, and end ranks that still save.
    """
    folder = os.environ.get(FOLDER)
    if not folder or not code:
        return code
    try:
        (Path(folder) / os.environ.get("RANK", "0")).write_text(str(code))
    except OSError:
        return code
    return 0 if code == PREEMPTED else code


def lets_others_end(code: int) -> bool:
    """Whether the launcher lets the other ranks end by themselves after one that ended with `code`."""
    return code == PREEMPTED and bool(os.environ.get(FOLDER))


def collect(folder: Path) -> int | None:
    """The smallest exit code that a rank left: a failure rather than a preemption. None if all ended with 0 or were killed."""
    codes = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError, ValueError):
            codes.append(int(file.read_text()))
    return min(codes, default=None)
