"""Train a recipe twice, once undisturbed and once with killed processes, damaged checkpoints and failing stores, and compare."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.commands.signature import Count, NonNegative, PositiveReal, checked
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.runs.equality import compare, step_seconds
from vaescale.runs.faulty_store import EXPERIMENT, FaultyStore
from vaescale.runs.folder import METRICS
from vaescale.runs.stores import is_installed
from vaescale.system.console import say
from vaescale.system.faults import (
    FAULTS,
    NOTICED_BY_OTHERS,
    OF_A_RANK,
    Family,
    damage,
    inject,
    kill_injected,
    own_shared_memory,
)
from vaescale.system.meeting import WAIT
from vaescale.system.shipped import BACKENDS, shipped_file

EARLY = "finished before its fault"
FULL = "full shm"
OF_THE_STORE = {  # and what training must say
    "lost run": r"was deleted; a new run",
    "artifacts away": r"does not get the run's files|is behind",
}
KINDS = (*FAULTS, *OF_THE_STORE)
DAMAGE_PROBABILITY = 0.3
STARTS_BEYOND = 3  # one of the last starts, which have no fault, must reach the last step
ENDS_WITHIN = 300  # seconds after its fault
POLL_SECONDS = 0.1
WATCHDOG_SECONDS = 20  # training.watchdog_seconds, and how long ranks wait for each other at the start
ALWAYS = ("training.log_every=1", f"training.watchdog_seconds={WATCHDOG_SECONDS}")
TRACEBACK = "Traceback (most recent call last)"
# The last one is of torch's launcher, which names a rank that was killed before it could speak.
SENTENCE = re.compile(
    r"^vaescale (train|launch): |^SIGTERM: |asked to stop|SIGKILL\) received by PID", re.MULTILINE
)


class Setup(NamedTuple):
    """The recipe, the way to start it, and the folder of the two runs, `peace` and `chaos`.

    faults: those to choose from, by kind. store: that of the run `chaos`, or None.
    """

    recipe: Path
    overrides: Sequence[str]
    backend: str | None
    processes: int | None
    folder: Path
    faults: Mapping[str, Callable[[Family], None]]
    store: FaultyStore | None

    @property
    def is_launched(self) -> bool:
        """Whether a launcher starts the processes that train."""
        return self.backend is not None

    @property
    def silent(self) -> tuple[str, ...]:
        """The kinds after which no process is left to say why training ended."""
        return ("kill all",) if self.is_launched else ("kill all", "kill one")


class Ends(NamedTuple):
    """What the faults caused, by kind: their number, the most seconds from fault to end, and the kinds whose end nothing explained.

    sentences: seconds from each fault to the sentence on the end.
    """

    counts: Counter[str]
    slowest: dict[str, float]
    sentences: list[float]
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
    the time that steps took which count. kinds: names of `KINDS`; default: all that apply. One that cannot be caused here is
    reported and left out. backend: a name in recipes/backends, such as zero2, or a YAML file of accelerate's. patience: maximum
    seconds of an undisturbed start. Raises UserError when a start hangs or fails by itself.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="vaescale-chaos-"))
    if any((folder / name).exists() for name in ("peace", "chaos")):
        raise UserError(f"--folder {folder} already holds runs; choose another folder")
    chosen = _kinds(kinds, recipe, overrides, alone=backend is None)
    chance = random.Random(seed)  # noqa: S311
    with _ended_by_sigterm(), contextlib.ExitStack() as stack:
        store, known = None, dict(FAULTS)
        if any(kind in OF_THE_STORE for kind in chosen):
            store = stack.enter_context(FaultyStore(folder, folder / "chaos"))
            known |= {"lost run": store.lose_run, "artifacts away": store.withhold_files}
        causes = {kind: known[kind] for kind in chosen}
        setup = Setup(recipe, overrides, backend, processes, folder, causes, store)
        begun = time.monotonic()
        if (code := _trained(setup, "peace", patience)) != 0:
            raise UserError(f"training fails without any fault ({code}); see {folder / 'peace.log'}")
        seconds = time.monotonic() - begun
        begun = time.monotonic()
        if mtbf_seconds is None:
            ends = _disturb_starts(setup, 10 if faults is None else faults, chance, seconds)
        else:
            ends = _disturb_one_training(setup, faults, chance, mtbf_seconds)
        _finish(setup, patience)
        wall = time.monotonic() - begun
        result = {"folder": str(folder), "faults": dict(ends.counts), **compare(folder)}
        result |= store.lacks() if store is not None else {}
    result |= {
        "slowest_end_seconds": round(max(ends.slowest.values(), default=0.0), 1),
        "slowest_sentence_seconds": round(max(ends.sentences, default=0.0), 1),
        "slowest_ends": {kind: round(took, 1) for kind, took in ends.slowest.items()},
        "unexplained": ends.unexplained,
    }
    if mtbf_seconds is not None:
        result |= {
            "goodput": round(step_seconds(folder / "peace") / wall, 4),
            "wall_seconds": round(wall, 1),
        }
    return result


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that no start is left behind. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _kinds(given: Sequence[str] | None, recipe: Path, overrides: Sequence[str], *, alone: bool) -> list[str]:
    """The kinds of faults to choose from. Reports those that cannot be caused here.

    alone: whether training has one process. Raises UserError for an unknown kind, for one that training cannot meet, and when
    none is left.
    """
    if unknown := sorted(set(given or ()) - set(KINDS)):
        raise UserError(f"--kinds {unknown[0]!r} is unknown; known: {', '.join(KINDS)}")
    unmet = dict.fromkeys(
        NOTICED_BY_OTHERS if alone else (), "needs several processes, which notice it; give --backend"
    )
    if given is None or FULL in given:
        data = load_recipe(recipe, list(overrides)).data
        if not data.workers or data.cache == "memory":
            unmet[FULL] = "needs reading processes; give data.workers=2 data.cache=none"
    for kind in given or ():
        if kind in unmet:
            raise UserError(f"--kinds {kind!r} {unmet[kind]}")
    chosen = [kind for kind in given or KINDS if kind not in unmet]
    impossible = {}
    if FULL in chosen and own_shared_memory() is None:
        impossible[FULL] = (
            "this user cannot mount a /dev/shm for one process (unshare --mount fails), and the machine's is not filled"
        )
    if not is_installed():
        impossible |= dict.fromkeys(OF_THE_STORE, "MLflow is not installed; pip install mlflow")
    for kind in chosen:
        if kind in impossible:
            say(f"the fault {kind!r} is left out: {impossible[kind]}")
    if not (possible := [kind for kind in chosen if kind not in impossible]):
        raise UserError("no fault of --kinds can be caused here; leave --kinds out for all others")
    return possible


def _disturb_starts(setup: Setup, faults: int, chance: random.Random, seconds: float) -> Ends:
    """Disturb `faults` starts, each at a random time within `seconds`."""
    ends = Ends(Counter(), {}, [], [])
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
    ends = Ends(Counter(), {}, [], [])
    while faults is None or ends.counts.total() < faults:
        if not _disturb_once(setup, ends, chance, chance.expovariate(1 / mtbf)):
            break
    return ends


def _disturb_once(setup: Setup, ends: Ends, chance: random.Random, seconds: float) -> bool:
    """Start training and disturb it after some seconds. Returns False if it ended before. Raises UserError if it failed then."""
    kind, log = chance.choice(list(setup.faults)), _Log(setup.folder / "chaos.log")
    started = _start(setup, "chaos")
    took = _disturb(setup, started, kind, seconds, log)
    if took is None:
        if started.returncode:
            raise UserError(f"a start ended with {started.returncode} by itself; see {log.path}")
        return False
    say(f"{kind}: the start ended with {started.returncode} after {took:.1f} s")
    ends.counts[kind] += 1
    ends.slowest[kind] = max(took, ends.slowest.get(kind, 0.0))
    if log.sentence_at is not None:
        ends.sentences.append(log.sentence_at)
    if not _is_explained(setup, kind, started.returncode, log.new()):
        ends.unexplained.append(kind)
    if chance.random() < DAMAGE_PROBABILITY and (done := _damage(setup.folder / "chaos", chance)):
        ends.counts[done] += 1
    return True


def _is_explained(setup: Setup, kind: str, code: int, said: str) -> bool:
    """Whether a start's words explain its fault and its end. code: its exit code. A launcher may print a traceback of its own."""
    if kind in setup.silent:
        return True
    if TRACEBACK in said and not setup.is_launched:
        return False
    is_noticed = re.search(OF_THE_STORE.get(kind, ""), said) is not None
    return is_noticed and (code == 0 or SENTENCE.search(said) is not None)


def _finish(setup: Setup, patience: float) -> None:
    """Start without faults until training reaches the last step. Raises UserError when it does not within a few starts."""
    for _ in range(STARTS_BEYOND):
        if _trained(setup, "chaos", patience) == 0:
            return
    raise UserError(f"training does not recover; see {setup.folder / 'chaos.log'}")


def _trained(setup: Setup, name: str, patience: float) -> int:
    """Train without a fault. Returns the exit code. Raises UserError when it takes more than `patience` seconds."""
    started = _start(setup, name)
    try:
        if not _has_ended(started, patience):
            raise UserError(
                f"a start did not end within {patience:.0f} s; look at {setup.folder / name}.log, or raise --patience"
            )
        return started.returncode
    finally:
        _kill(setup, started)


def _start(setup: Setup, name: str) -> "subprocess.Popen[bytes]":
    """Start `vaescale train` in a session of its own, with its output in NAME.log."""
    launcher: list[str] = []
    if setup.backend is not None:
        config = shipped_file(setup.backend, BACKENDS)
        launcher = ["accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(setup.processes)] if setup.processes else []
        launcher += ["--main_process_port", "0", "-m"]  # any free port: two trials do not meet
    command = [sys.executable, "-m", *launcher, "vaescale", "train", str(setup.recipe), *setup.overrides]
    if FULL in setup.faults:
        command = [*(own_shared_memory() or ()), *command]
    tracking = ["tracking.mlflow=null"]
    if setup.store is not None and name == "chaos":
        tracking = [f"tracking.mlflow={setup.store.uri}", f"tracking.experiment={EXPERIMENT}"]
    setup.folder.mkdir(parents=True, exist_ok=True)
    with (setup.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"run_dir={setup.folder / name}", *tracking, *ALWAYS],
            env=os.environ | inject(setup.folder / "inject") | {WAIT: str(WATCHDOG_SECONDS)} | _no_proxy(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class _Log:
    """What a start adds to the log of its run. sentence_at: seconds from its fault to its sentence, if there was one."""

    def __init__(self, path: Path) -> None:
        self.path, self._before = path, _size(path)
        self.sentence_at: float | None = None

    def new(self) -> str:
        return self.path.read_bytes()[self._before :].decode(errors="replace")

    def note(self, seconds: float) -> None:
        """Note the sentence, if it is there and was not before."""
        if self.sentence_at is None and SENTENCE.search(self.new()):
            self.sentence_at = seconds


def _disturb(
    setup: Setup, started: "subprocess.Popen[bytes]", kind: str, seconds: float, log: _Log
) -> float | None:
    """Wait for `seconds`, then cause a fault. Returns the seconds from fault to end, None if the process ended before.

    Raises UserError when the process does not end within ENDS_WITHIN seconds. No process of it is left behind.
    """
    num_bytes = _size(setup.folder / "chaos" / METRICS)
    try:
        if _has_ended(started, seconds) or (family := _ready(setup, started, kind, num_bytes)) is None:
            return None
        begun = time.monotonic()
        setup.faults[kind](family)
        while not _has_ended(started, POLL_SECONDS):
            log.note(took := time.monotonic() - begun)
            if took > ENDS_WITHIN:
                raise UserError(
                    f"a start did not end within {ENDS_WITHIN} s after the fault {kind!r}; look at {log.path}"
                )
        took = time.monotonic() - begun
        log.note(took)
        return took
    finally:
        _kill(setup, started)
        if setup.store is not None:
            setup.store.answer()


def _ready(setup: Setup, started: "subprocess.Popen[bytes]", kind: str, num_bytes: int) -> Family | None:
    """The processes, once a fault can meet them; None if training ended before.

    A fault of a rank needs a rank. One of the store or of the readers needs a row of training, beyond the `num_bytes` of the rows of
    earlier starts.
    """
    needs_row = kind in (*OF_THE_STORE, FULL)
    while True:
        family = Family.of(started.pid, launched=setup.is_launched)
        has_row = _size(setup.folder / "chaos" / METRICS) > num_bytes
        if (family.ranks or kind not in OF_A_RANK) and (has_row or not needs_row):
            return family
        if _has_ended(started, POLL_SECONDS):
            return None


def _kill(setup: Setup, started: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a start: all of it, or what a killed launcher leaves behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    kill_injected(setup.folder / "inject")
    started.wait()


def _no_proxy() -> dict[str, str]:
    """The variables that keep requests to this machine from a proxy."""
    names = ("no_proxy", "NO_PROXY")
    return {name: ",".join(filter(None, (os.environ.get(name), "127.0.0.1"))) for name in names}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _has_ended(started: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    try:
        started.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _damage(run: Path, chance: random.Random) -> str | None:
    """Damage a file of the newest checkpoint, if an older checkpoint exists. Returns the kind of damage, or None."""
    saved = sorted(path for path in (run / "checkpoints").glob("step-*") if "tmp" not in path.name)
    if len(saved) < 2:
        return None
    return damage(chance.choice(sorted(saved[-1].iterdir())), chance)
