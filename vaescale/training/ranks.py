"""accelerate's launcher of a node's ranks, as `vaescale launch` starts it: `python -m vaescale.training.ranks OPTIONS -m MODULE`.

A rank that fails has said why. The launcher's own traceback of that is replaced by one sentence, and only where a rank was
killed or left no exit code. Its folder of logs, which stays empty, is removed with that of the exit codes.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from vaescale.system import exit_codes
from vaescale.system.console import say
from vaescale.system.early_stop import TERMINATED
from vaescale.system.host import follow_parent


def main(words: Sequence[str]) -> int:
    """Start the ranks and wait for them. Returns 0, or the exit code of the first one that failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    follow_parent(signal.SIGKILL)
    for part in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    folder = os.environ.get(exit_codes.FOLDER)
    logs = ["--log_dir", os.path.join(folder, exit_codes.LOGS)] if folder else []
    try:
        launch_command(launch_command_parser().parse_args([*logs, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(failure.exitcode, f"rank {rank} (process {failure.pid})", folder, rank)
    except subprocess.CalledProcessError as error:  # of a single rank
        return _code(error.returncode, "rank 0", folder, 0)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _code(code: int, who: str, folder: str | None, rank: int) -> int:
    """A rank's exit code as a shell has it. Names the rank if it was killed, or ended without a code of vaescale's."""
    if code in (-signal.SIGTERM, TERMINATED):
        return TERMINATED  # the launcher knows who asked
    left = exit_codes.left_for(folder, rank)
    if left is not None and code == -signal.SIGKILL:
        return left  # another rank ended it, and has said why
    if code < 0:
        name = signal.Signals(-code).name
        memory = (
            ", perhaps for want of memory (`dmesg` names what the kernel kills)" if name == "SIGKILL" else ""
        )
        say(f"vaescale launch: {who} was killed by {name}{memory}")
        return 128 - code
    if left is None:
        say(f"vaescale launch: {who} ended with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
