"""Train a recipe twice, once undisturbed and once with killed processes and damaged checkpoints, and compare the two runs."""

import contextlib
import os
import random
import re
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
from vaescale.system.faults import FAULTS, NOTICED_BY_OTHERS, Family, inject
from vaescale.system.meeting import WAIT
from vaescale.system.shipped import BACKENDS, shipped_file

DAMAGES = ("flip a bit", "truncate")
EARLY = "finished before its fault"
DAMAGE_PROBABILITY = 0.3
STARTS_BEYOND = 3  # one of the last starts, which have no fault, must reach the last step
ENDS_WITHIN = 300  # seconds after its fault
WATCHDOG_SECONDS = 20  # training.watchdog_seconds, and how long ranks wait for each other at the start
ALWAYS = ("training.log_every=1", "tracking.mlflow=null", f"training.watchdog_seconds={WATCHDOG_SECONDS}")
SILENT = ("kill all",)  # no process is left to say why it ended
# The last one is of torch's launcher, which names a rank that was killed before it could speak.
SENTENCE = re.compile(
    r"^vaescale (train|launch): |^SIGTERM: |asked to stop|SIGKILL\) received by PID", re.MULTILINE
)


class Setup(NamedTuple):
    """The recipe, the way to start it, and the folder of the two runs, `peace` and `chaos`. kinds: the faults to choose from."""

    recipe: Path
    overrides: Sequence[str]
    backend: str | None
    processes: int | None
    folder: Path
    kinds: Sequence[str]


class Ends(NamedTuple):
    """What the faults caused: their number by kind, the seconds from fault to end, and the kinds whose end nothing explained."""

    counts: Counter[str]
    seconds: list[float]
    unexplained: list[str]


@checked
def chaos(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    faults: NonNegative | None = None,
    mtbf_seconds: PositiveReal | None = None,
    kinds: Sequence[str] | None = None,
    backend: str | None = None,
    processes: Count | None = None,
    patience: PositiveReal = 3600,
    seed: int = 0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train with and without faults. Returns the number of faults of each kind and the differences between the two runs.

    faults: number of starts to disturb, each at a random time of training; default: 10. mtbf_seconds: the mean time between two
    faults of a training that is disturbed until it reaches its last step, or `faults` faults; the result has its goodput, the share of
    the time that steps took which count. kinds: names of `FAULTS`; default: all that apply. backend: a name in recipes/backends,
    such as zero2, or a YAML file of accelerate's. patience: maximum seconds of an undisturbed start. Raises UserError when a
    start hangs or fails by itself.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="vaescale-chaos-"))
    if any((folder / name).exists() for name in ("peace", "chaos")):
        raise UserError(f"--folder {folder} already holds runs; choose another folder")
    setup = Setup(recipe, overrides, backend, processes, folder, _kinds(kinds, alone=backend is None))
    chance = random.Random(seed)  # noqa: S311
    try:
        begun = time.monotonic()
        if _start(setup, "peace").wait(patience) != 0:
            raise UserError(f"training fails without any fault; see {folder / 'peace.log'}")
        seconds = time.monotonic() - begun
        begun = time.monotonic()
        if mtbf_seconds is None:
            ends = _disturb_starts(setup, 10 if faults is None else faults, chance, seconds)
        else:
            ends = _disturb_one_training(setup, faults, chance, mtbf_seconds)
        _finish(setup, patience)
        wall = time.monotonic() - begun
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"a start did not end within {error.timeout:.0f} s; look at its processes and its log"
        ) from error
    result = {"folder": str(folder), "faults": dict(ends.counts), **_compare(folder)}
    result |= {
        "slowest_end_seconds": round(max(ends.seconds, default=0.0), 1),
        "unexplained": ends.unexplained,
    }
    if mtbf_seconds is not None:
        result |= {
            "goodput": round(_step_seconds(folder / "peace") / wall, 4),
            "wall_seconds": round(wall, 1),
        }
    return result


def _kinds(given: Sequence[str] | None, *, alone: bool) -> list[str]:
    """The kinds of faults to choose from. alone: whether training has one process. Raises UserError for an unknown kind."""
    apply = [kind for kind in FAULTS if not alone or kind not in NOTICED_BY_OTHERS]
    if unknown := sorted(set(given or ()) - FAULTS.keys()):
        raise UserError(f"--kinds {unknown[0]!r} is unknown; known: {', '.join(FAULTS)}")
    if useless := sorted(set(given or ()) - set(apply)):
        raise UserError(f"--kinds {useless[0]!r} needs several processes, which notice it; give --backend")
    return list(given or apply)


def _disturb_starts(setup: Setup, faults: int, chance: random.Random, seconds: float) -> Ends:
    """Disturb `faults` starts, each at a random time within `seconds`."""
    ends = Ends(Counter(), [], [])
    for _ in range(faults):
        if not _disturb_once(setup, ends, chance, chance.uniform(0, seconds)):
            ends.counts[EARLY] += 1
            shutil.rmtree(setup.folder / "chaos")  # the next start begins at step 0
    if early := ends.counts[EARLY]:
        say(
            f"{early} of the starts ended before their fault; train longer to disturb more of them (training.steps=...)"
        )
    return ends


def _disturb_one_training(setup: Setup, faults: int | None, chance: random.Random, mtbf: float) -> Ends:
    """Disturb one training until it reaches its last step, at exponential times with the mean `mtbf` seconds."""
    ends = Ends(Counter(), [], [])
    while faults is None or ends.counts.total() < faults:
        if not _disturb_once(setup, ends, chance, chance.expovariate(1 / mtbf)):
            break
    return ends


def _disturb_once(setup: Setup, ends: Ends, chance: random.Random, seconds: float) -> bool:
    """Start training and disturb it after some seconds. Returns False if it ended before. Raises UserError if it failed then."""
    kind, log = chance.choice(setup.kinds), setup.folder / "chaos.log"
    written = log.stat().st_size if log.is_file() else 0
    started = _start(setup, "chaos")
    took = _disturb(started, kind, seconds)
    if took is None:
        if started.returncode:
            raise UserError(f"a start ended with {started.returncode} by itself; see {log}")
        return False
    ends.counts[kind] += 1
    ends.seconds.append(took)
    if (
        started.returncode
        and kind not in SILENT
        and not SENTENCE.search(log.read_bytes()[written:].decode(errors="replace"))
    ):
        ends.unexplained.append(kind)
    if chance.random() < DAMAGE_PROBABILITY and (damage := _damage(setup.folder / "chaos", chance)):
        ends.counts[damage] += 1
    return True


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
            [*command, f"run_dir={setup.folder / name}", *ALWAYS],
            env=os.environ | inject(setup.folder / "inject") | {WAIT: str(WATCHDOG_SECONDS)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _disturb(started: "subprocess.Popen[bytes]", kind: str, seconds: float) -> float | None:
    """Wait for `seconds`, then cause a fault. Returns the seconds from fault to end, None if the process ended before."""
    try:
        started.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        pass
    begun = time.monotonic()
    FAULTS[kind](Family.of(started.pid))
    started.wait(ENDS_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)  # processes that a killed launcher leaves behind
    return time.monotonic() - begun


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


def _step_seconds(run: Path) -> float:
    """The seconds that the steps of a run took, by the durations in its rows."""
    return sum(row.get("perf/step_seconds", 0.0) for row in _rows(run).values())


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
