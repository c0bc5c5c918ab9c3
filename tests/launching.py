"""`vaescale train` as a person starts it: in processes of its own, under the launcher or not, and stopped from outside."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/digits/optimal.yaml"
PATIENCE_SECONDS = 240


def make_project(folder: Path, digits: Path) -> Path:
    """A folder with the recipes and the digits, as after a person's first commands."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return folder


def command(
    *words: str, backend: str | None = None, processes: int | None = None, launch: bool = False
) -> list[str]:
    """`python -m vaescale train RECIPE ...`, under accelerate's launcher with recipes/backends/BACKEND.yaml if there is one, or
    with `launch` as `vaescale launch` starts it.
    """
    launcher: list[str] = []
    if launch:
        options = ["--processes", str(processes or 2), "--backend", str(backend)]
        return [sys.executable, "-m", "vaescale", "launch", *options, RECIPE, "tracking.mlflow=null", *words]
    if backend is not None:
        launcher = ["accelerate.commands.launch", "--config_file", f"recipes/backends/{backend}.yaml"]
        launcher += ["--num_processes", str(processes)] if processes else []
        launcher += ["-m"]
    return [sys.executable, "-m", *launcher, "vaescale", "train", RECIPE, "tracking.mlflow=null", *words]


def environment(**more: str) -> dict[str, str]:
    """As a fresh shell's, with one thread a process, or four of them on two cores wait for each other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def train(
    folder: Path, *words: str, backend: str | None = None, processes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """To the end, whatever that is."""
    return finished(command(*words, backend=backend, processes=processes), folder)


def finished(
    words: list[str], folder: Path, *, timeout: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """A command in a folder, as from a fresh shell, with what it printed."""
    return subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train_until(
    folder: Path,
    run: Path,
    rows: int,
    *words: str,
    backend: str | None = None,
    processes: int | None = None,
    send: signal.Signals = signal.SIGTERM,
    to_rank: int | None = None,
    kill_when: str | None = None,
    launch: bool = False,
) -> tuple[int, str]:
    """Until so many rows are written, then a signal to the process that a person would see, or to one of those that train.
    Returns exit code and words. kill_when: words after which nothing is of interest; a launcher takes 30 s to give up.
    """
    with (folder / "words.log").open("w+") as log:
        words = (*words, f"run_dir={run}")
        started = subprocess.Popen(
            command(*words, backend=backend, processes=processes, launch=launch),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while started.poll() is None and len(curve(run)) < rows and time.monotonic() < deadline:
            time.sleep(0.02)
        if to_rank is None:
            started.send_signal(send)
        elif started.poll() is None:
            os.kill(rank_process(started.pid, to_rank), send)
        if kill_when is not None:
            while started.poll() is None and kill_when not in (folder / "words.log").read_text():
                time.sleep(0.1)
            for process in (*children(started.pid), started.pid):
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself since
                    os.kill(process, signal.SIGKILL)
        code = started.wait(60)
        log.seek(0)
        return code, log.read()


def curve(run: Path) -> list[dict[str, float]]:
    """The training rows, a replayed step's last one alone."""
    path = run / "metrics.jsonl"
    rows: dict[float, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # just being written
            continue
        if "train/mse" in row:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def checkpoints(run: Path) -> list[str]:
    """Their folders' names."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def rank_process(launcher: int, rank: int) -> int:
    """The process number of a rank that a launcher started."""
    for child in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise ProcessLookupError(f"process {launcher} has no rank {rank}")


def children(process: int) -> list[int]:
    """What a process started and still lives."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
