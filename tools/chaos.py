"""Train a recipe while killing its processes, damaging its checkpoints and asking it to stop, then compare the outcome with
a run that was left in peace.

    vaescale chaos recipes/digits/optimal.yaml --faults 20 --backend cpu2 training.steps=300

What must come out: the same metrics at every step and the same weights, bit for bit, and no row lost. Under another backend
than one process, `--backend NAME` is a file of recipes/backends/.
"""

import argparse
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
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.system.console import say

KILLS = ("kill all", "kill one", "terminate")
DAMAGES = ("flip a bit", "truncate")
STARTS_BEYOND = 3  # without a fault, a start must finish
ENDS_WITHIN = 300  # seconds after its fault


class Place(NamedTuple):
    """Where and how training is started."""

    recipe: Path
    overrides: list[str]
    backend: str | None
    processes: int | None
    folder: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE, overrides and how much chaos."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file whose data is there")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    parser.add_argument("--faults", type=int, default=10, help="how many starts end in a fault; default: 10")
    parser.add_argument("--backend", help="of recipes/backends/, such as zero2; default: one process")
    parser.add_argument("--processes", type=int, help="other than the backend's file says")
    parser.add_argument(
        "--patience",
        type=float,
        default=3600,
        help="seconds that an undisturbed start may take; default: 3600",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults; default: 0")
    parser.add_argument("--folder", type=Path, help="where the two runs stay; default: a temporary one")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train twice. Raises UserError when a start hangs or fails by itself."""
    try:
        return _run(arguments)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"a start did not end within {error.timeout:.0f} s; look at its processes and its log"
        ) from error


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how many faults of which kind there were, and what differs."""
    if arguments.faults < 0:
        raise UserError(f"--faults (={arguments.faults}) must not be negative")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="vaescale-chaos-"))
    if any((folder / name).exists() for name in ("peace", "chaos")):
        raise UserError(f"--folder {folder} holds runs already; name another one")
    place = Place(arguments.recipe, arguments.overrides, arguments.backend, arguments.processes, folder)
    begun = time.monotonic()
    started = _start(place, "peace")
    if started.wait(arguments.patience) != 0:
        raise UserError(f"training does not even work in peace; see {folder / 'peace.log'}")
    seconds = time.monotonic() - begun
    chance, counts = random.Random(arguments.seed), Counter[str]()  # noqa: S311
    for _ in range(arguments.faults):
        kind = chance.choice(KILLS)
        started = _start(place, "chaos")
        if not _disturb(started, kind, chance.uniform(0, seconds)):
            if started.returncode:
                raise UserError(
                    f"a start ended with {started.returncode} by itself; see {folder / 'chaos.log'}"
                )
            counts["finished before its fault"] += 1
            shutil.rmtree(folder / "chaos")  # and once more from the start
            continue
        counts[kind] += 1
        if chance.random() < 0.3 and (damage := _damage(folder / "chaos", chance)):
            counts[damage] += 1
    if early := counts["finished before its fault"]:
        say(
            f"{early} of the starts ended before their fault; a longer training takes more (training.steps=...)"
        )
    codes = []
    for _ in range(STARTS_BEYOND):
        codes.append(_start(place, "chaos").wait(arguments.patience))
        if codes[-1] == 0:
            break
    if codes[-1] != 0:
        raise UserError(f"training does not recover; see {folder / 'chaos.log'}")
    return {"folder": str(folder), "faults": dict(counts), **_compare(folder)}


def show(result: dict[str, Any]) -> None:
    """A line each."""
    from vaescale.system.console import table

    rows = [(name, str(count)) for name, count in result["faults"].items()]
    rows += [(name, str(value)) for name, value in result.items() if name != "faults"]
    table("chaos", rows)


def exit_code(result: dict[str, Any]) -> int:
    """4 unless everything came out the same."""
    return 0 if result["bit_equal"] and not result["rows_lost"] else 4


def _start(place: Place, name: str) -> "subprocess.Popen[bytes]":
    """`vaescale train` in a session of its own, its words in NAME.log."""
    launcher: list[str] = []
    if place.backend is not None:
        config = Path("recipes") / "backends" / f"{place.backend}.yaml"
        if not config.is_file():
            raise UserError(f"--backend {place.backend} is not there ({config})")
        launcher = ["accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(place.processes)] if place.processes else []
        launcher += ["-m"]
    command = [sys.executable, "-m", *launcher, "vaescale", "train", str(place.recipe), *place.overrides]
    place.folder.mkdir(parents=True, exist_ok=True)
    with (place.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"run_dir={place.folder / name}", "training.log_every=1", "tracking.mlflow=null"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _disturb(started: "subprocess.Popen[bytes]", kind: str, seconds: float) -> bool:
    """Let it run for so long, then do it. False if it had ended by itself."""
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
        os.killpg(started.pid, signal.SIGKILL)  # what a killed launcher leaves behind
    return True


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _descendants(process: int) -> list[int]:
    """Of a process, the launched ones last."""
    try:
        words = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    own = [int(word) for word in words]
    return [*own, *(inner for child in own for inner in _descendants(child))]


def _damage(run: Path, chance: random.Random) -> str | None:
    """Damage a file of the newest checkpoint, if there are others."""
    found = sorted(path for path in (run / "checkpoints").glob("step-*") if "tmp" not in path.name)
    if len(found) < 2:
        return None
    path, kind = chance.choice(sorted(found[-1].iterdir())), chance.choice(DAMAGES)
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return kind


def _rows(run: Path) -> dict[int, dict[str, float]]:
    from vaescale.runs.folder import read_metrics

    return {int(row["step"]): row for row in read_metrics(run) if "train/mse" in row}


def _compare(folder: Path) -> dict[str, Any]:
    """What differs between the run in peace and the other one."""
    import torch
    from safetensors.torch import load_file

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
        one, other = load_file(path), load_file(folder / "chaos" / "checkpoints" / last / path.name)
        unequal += [f"{path.stem}:{name}" for name in one if not torch.equal(one[name], other[name])]
    said = (folder / "chaos.log").read_text(errors="replace")
    return {
        "steps": len(peace),
        "rows_lost": len(peace.keys() - chaos.keys()),
        "rows_differing": len(differing),
        "tensors_differing": len(unequal),
        "bit_equal": not differing and not unequal,
        "checkpoints_passed_over": said.count("passing over checkpoint"),
    }


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
