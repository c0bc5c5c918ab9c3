"""Several `vaescale` commands in the same processes, in layouts that a launcher's variables would ask for.

A new process takes seconds to import everything. These are forked from one that has done so, run all commands one after the
other, and share one process group.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple, NoReturn
from unittest.mock import patch

import torch

from tests.blank_figures import white_curves
from tests.ranks import PRELOADED, forked

# accelerate and DeepSpeed import the last two at the start of each rank: transformers, and an optimizer that compiles.
TRAINING = (
    *(
        "torch._dynamo",
        "matplotlib.backends.backend_agg",
        "vaescale.commands.train",
        "vaescale.commands.evaluate",
    ),
    *("deepspeed", "transformers", "deepspeed.runtime.zero.muon.muon_optimizer"),
)
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
OFFLOADED = dict.fromkeys(
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"), "cpu"
)
LAYOUTS = {
    "ddp": {},
    **{f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (2, 3)},
    "zero3_offload": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | OFFLOADED,
    # A user's DeepSpeed file in place of accelerate's variables.
    "zero1": ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(Path(__file__).with_name("zero1.json"))},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


class Command(NamedTuple):
    """`vaescale WORDS` in a layout. stop_after: rows of metrics, then the last rank gets SIGTERM and 75 is expected; 0: never."""

    layout: str
    words: list[str]
    stop_after: int = 0


def several(folder: Path, commands: list[Command], *, processes: int = 1) -> list[str]:
    """Commands one after the other in the same processes, in a folder. Returns what each printed, all ranks together."""
    outs = [folder / f"out-{uuid.uuid4().hex}" for _ in commands]
    errors = folder / f"errors-{uuid.uuid4().hex}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        forked(
            run_all,
            folder,
            commands,
            outs,
            errors,
            processes,
            port,
            ranks=processes,
            preloaded=PRELOADED + TRAINING,
        )
    except Exception as error:
        raise AssertionError(f"{error}\n{errors.read_text()}") from error
    return [out.read_text() if out.is_file() else "" for out in outs]


def run_all(
    rank: int,
    folder: Path,
    commands: list[Command],
    outs: list[Path],
    errors: Path,
    processes: int,
    port: int,
) -> None:
    """One rank: each command from the start. Ends the process with the first unexpected code."""
    words = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    for command, out in zip(commands, outs, strict=True):
        if command.stop_after:
            stop_after(command.stop_after, command.words)
        code = run(command, out)
        if code != (75 if command.stop_after else 0):
            code = code or 1
            break
        code = 0
    sys.stderr.flush()
    os._exit(code)


def run(command: Command, out: Path) -> int:
    """One command. Returns its exit code."""
    from accelerate.state import AcceleratorState, GradientState

    from vaescale import cli
    from vaescale.training import launch

    process, exit_now = os.getpid(), os._exit

    def leave(code: int) -> NoReturn:
        """A verb on several ranks ends its process at once; a forked reader must do so here, too."""
        if os.getpid() != process:
            exit_now(code)
        raise SystemExit(code)

    for name in {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        *(name for variables in LAYOUTS.values() for name in variables),
    }:
        os.environ.pop(name, None)
    os.environ.update(LAYOUTS[command.layout])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with (
        patch("os._exit", leave),
        patch.object(launch, "stop", lambda _: None),
        patch.object(cli, "FIRST_SPEAKS_SECONDS", 0.0),  # no launcher ends the first rank
        out.open("a") as printed,
        contextlib.redirect_stdout(printed),
        white_curves(),
    ):
        try:
            return cli.main(command.words)
        except SystemExit as stop:
            return int(stop.code or 0)


def stop_after(rows: int, words: list[str]) -> None:
    """Send SIGTERM to this process, if it is the last rank, when a run has so many rows of metrics."""
    (run_dir,) = (word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))
    metrics = Path(run_dir) / "metrics.jsonl"

    def wait() -> None:
        while not metrics.is_file() or metrics.read_text().count("train/mse") < rows:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        threading.Thread(target=wait, daemon=True).start()
