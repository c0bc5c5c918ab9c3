"""Several `vaescale` commands in the same processes, in layouts that a launcher's variables would ask for.

    python -m tests.distributed.several COMMANDS.json

COMMANDS.json lists objects with `layout` (a key of LAYOUTS), `words` (what follows `vaescale`) and `out` (the file that gets the
standard output of all ranks). A new process takes seconds to import everything; this one does so once for all commands.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from accelerate.state import AcceleratorState, GradientState

from vaescale.cli import main
from vaescale.training import launch

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
OFFLOADED = dict.fromkeys(
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"), "cpu"
)
LAYOUTS = {
    "ddp": {},
    **{f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
    "zero3_offload": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | OFFLOADED,
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


def run_all(path: Path) -> None:
    """Each command from the start, with one process group for all. Exits with the first error code."""
    process, exit_now = os.getpid(), os._exit

    def leave(code: int) -> NoReturn:
        """A verb on several ranks ends its process at once; a forked reader must do so here, too."""
        if os.getpid() != process:
            exit_now(code)
        raise SystemExit(code)

    with patch("os._exit", leave), patch.object(launch, "stop", lambda _: None):
        for command in json.loads(path.read_text()):
            for name in {name for variables in LAYOUTS.values() for name in variables}:
                os.environ.pop(name, None)
            os.environ.update(LAYOUTS[command["layout"]])
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            with Path(command["out"]).open("a") as out, contextlib.redirect_stdout(out):
                try:
                    code = main(command["words"])
                except SystemExit as stop:
                    code = int(stop.code or 0)
            if code:
                sys.exit(code)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)
