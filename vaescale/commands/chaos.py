"""Train a recipe twice, once undisturbed and once with killed processes and damaged checkpoints, and compare the two runs."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from vaescale.commands.signature import Count, NonNegative, PositiveReal, checked
from vaescale.errors import UserError
from vaescale.runs.folder import read_metrics
from vaescale.system.console import say
from vaescale.system.shipped import BACKENDS, shipped_file

KILLS = ("kill all", "kill one", "terminate")
DAMAGES = ("flip a bit", "truncate")
EARLY = "finished before its fault"
DAMAGE_PROBABILITY = 0.3
STARTS_BEYOND = 3  # one of the last starts, which have no fault, must reach the last step
ENDS_WITHIN = 300  # seconds after its fault


class Setup(NamedTuple):
    """The recipe, the way to start it, and the folder of the two runs, `peace` and `chaos`."""

    recipe: Path
    overrides: Sequence[str]
    backend: str | None
    processes: int | None
    folder: Path


@checked
def chaos(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    faults: NonNegative = 10,
    backend: str | None = None,
    processes: Count | None = None,
    patience: PositiveReal = 3600,
    seed: int = 0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train with and without faults. Returns the number of faults of each kind and the differences between the two runs.

    faults: number of starts to disturb. backend: a name in recipes/backends, such as zero2, or a YAML file of accelerate's.
    patience: maximum seconds of an undisturbed start. Raises UserError when a start hangs or fails by itself.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="vaescale-chaos-"))
    if any((folder / name).exists() for name in ("peace", "chaos")):
        raise UserError(f"--folder {folder} already holds runs; choose another folder")
    setup = Setup(recipe, overrides, backend, processes, folder)
    try:
        begun = time.monotonic()
        if _start(setup, "peace").wait(patience) != 0:
            raise UserError(f"training fails without any fault; see {folder / 'peace.log'}")
        counts = _cause_faults(setup, faults, random.Random(seed), time.monotonic() - begun)  # noqa: S311
        _finish(setup, patience)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"a start did not end within {error.timeout:.0f} s; look at its processes and its log"
        ) from error
    return {"folder": str(folder), "faults": dict(counts), **_compare(folder)}


def _cause_faults(setup: Setup, faults: int, chance: random.Random, seconds: float) -> Counter[str]:
    """Disturb `faults` starts, each at a random time within `seconds`. Returns the number of faults of each kind."""
    counts = Counter[str]()
    for _ in range(faults):
        kind = chance.choice(KILLS)
        started = _start(setup, "chaos")
        if not _disturb(started, kind, chance.uniform(0, seconds)):
            if started.returncode:
                raise UserError(
                    f"a start ended with {started.returncode} by itself; see {setup.folder / 'chaos.log'}"
                )
            counts[EARLY] += 1
            shutil.rmtree(setup.folder / "chaos")  # the next start begins at step 0
            continue
        counts[kind] += 1
        if chance.random() < DAMAGE_PROBABILITY and (damage := _damage(setup.folder / "chaos", chance)):
            counts[damage] += 1
    if counts[EARLY]:
        say(
            f"{counts[EARLY]} of the starts ended before their fault; train longer to disturb more of them (training.steps=...)"
        )
    return counts


def _finish(setup: Setup, patience: float) -> None:
    """Start without faults until training reaches the last step. Raises UserError when it does not within a few starts."""
    for _ in range(STARTS_BEYOND):
        if _start(setup, "chaos").wait(patience) == 0:
            return
    raise UserError(f"training does not recover; see {setup.folder / 'chaos.log'}")


def _start(setup: Setup, name: str) -> "subprocess.Popen[bytes]":
    """Start `vaescale train` in a session of its own, with its output in NAME.log."""
    launcher: list[str] = []
    if setup.backend is not None:
        config = shipped_file(setup.backend, BACKENDS)
        launcher = ["accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(setup.processes)] if setup.processes else []
        launcher += ["-m"]
    command = [sys.executable, "-m", *launcher, "vaescale", "train", str(setup.recipe), *setup.overrides]
    setup.folder.mkdir(parents=True, exist_ok=True)
    with (setup.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"run_dir={setup.folder / name}", "training.log_every=1", "tracking.mlflow=null"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _disturb(started: "subprocess.Popen[bytes]", kind: str, seconds: float) -> bool:
    """Wait for `seconds`, then kill or terminate the process. Returns False if the process ended before."""
    try:
        started.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    family = [started.pid, *_descendants(started.pid)]
    workers = family[1:] or family
    if kind == "kill all":
        for process in family:
            _send(process, signal.SIGKILL)
    elif kind == "kill one":
        _send(workers[-1], signal.SIGKILL)
    else:
        _send(started.pid, signal.SIGTERM)
    started.wait(ENDS_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)  # processes that a killed launcher leaves behind
    return True


def _send(process: int, number: signal.Signals) -> None:
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


def _damage(run: Path, chance: random.Random) -> str | None:
    """Damage a file of the newest checkpoint, if an older checkpoint exists. Returns the kind of damage, or None."""
    saved = sorted(path for path in (run / "checkpoints").glob("step-*") if "tmp" not in path.name)
    if len(saved) < 2:
        return None
    path, kind = chance.choice(sorted(saved[-1].iterdir())), chance.choice(DAMAGES)
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return kind


def _rows(run: Path) -> dict[int, dict[str, float]]:
    return {int(row["step"]): row for row in read_metrics(run) if "train/mse" in row}


def _compare(folder: Path) -> dict[str, Any]:
    """Return the differences between the undisturbed run and the disturbed one."""
    peace, chaos = _rows(folder / "peace"), _rows(folder / "chaos")
    names = [name for name in next(iter(peace.values())) if name.startswith("train/")]
    differing = [
        step
        for step in peace.keys() & chaos.keys()
        if any(peace[step][n] != chaos[step].get(n) for n in names)
    ]
    last = sorted((folder / "peace" / "checkpoints").glob("step-*"))[-1].name
    unequal = []
    for path in sorted((folder / "peace" / "checkpoints" / last).glob("*.safetensors")):
        expected, tensors = load_file(path), load_file(folder / "chaos" / "checkpoints" / last / path.name)
        unequal += [
            f"{path.stem}:{name}" for name in expected if not torch.equal(expected[name], tensors[name])
        ]
    log = (folder / "chaos.log").read_text(errors="replace")
    return {
        "steps": len(peace),
        "rows_lost": len(peace.keys() - chaos.keys()),
        "rows_differing": len(differing),
        "tensors_differing": len(unequal),
        "bit_equal": not differing and not unequal,
        "checkpoints_passed_over": log.count("skipping checkpoint"),
    }
