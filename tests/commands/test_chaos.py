"""What `vaescale chaos` finds when it compares two runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vaescale.commands.chaos import _compare, _kinds, _step_seconds, chaos
from vaescale.errors import UserError
from vaescale.system.faults import FAULTS, Family, inject, kill_one


def write_run(folder: Path, rows: int, *, weight: float = 1.0) -> None:
    checkpoint = folder / "checkpoints" / "step-000000009"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.full((2,), weight), "bias": torch.zeros(3)}, checkpoint / "model.safetensors")
    lines = [json.dumps({"step": step, "time": 0.0, "train/mse": 1 / step}) for step in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("rows", "weight"), [(9, 1.0), (4, 1.0), (9, 2.0)])
def test_lost_rows_and_other_tensors_are_counted(tmp_path: Path, rows: int, weight: float) -> None:
    write_run(tmp_path / "peace", 9)
    write_run(tmp_path / "chaos", rows, weight=weight)
    (tmp_path / "chaos.log").write_text("skipping checkpoint a: damaged\nskipping checkpoint b: damaged\n")
    result = _compare(tmp_path)
    assert (result["steps"], result["rows_lost"]) == (9, 9 - rows)
    assert (result["tensors_differing"], result["bit_equal"]) == (int(weight != 1), weight == 1)
    assert result["checkpoints_passed_over"] == 2


def test_a_process_alone_cannot_notice_that_it_hangs(tmp_path: Path) -> None:
    alone = _kinds(None, alone=True)
    assert set(_kinds(None, alone=False)) - set(alone) == {"stop one", "hold lock"}
    assert set(_kinds(None, alone=False)) == set(FAULTS)
    with pytest.raises(UserError, match="--kinds 'stop one' needs several processes"):
        chaos(tmp_path / "recipe.yaml", kinds=["stop one"], folder=tmp_path)
    with pytest.raises(UserError, match="--kinds 'kill' is unknown; known: kill all, kill one"):
        chaos(tmp_path / "recipe.yaml", kinds=["kill"], folder=tmp_path)


def test_useful_time_is_that_of_the_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "time": 0.0, "train/mse": 1.0, "perf/step_seconds": 0.5} for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _step_seconds(tmp_path) == 1.5


def test_a_hung_process_has_python_s_lock(tmp_path: Path) -> None:
    """None of its threads runs until the call returns, which a signal of the system cuts short."""
    code = (
        "import os, signal, threading, time\n"
        "threading.Timer(0.3, lambda: print('a thread ran', flush=True)).start()\n"
        "print('ready', flush=True); os.kill(os.getpid(), signal.SIGUSR2); print('it returned', flush=True)\n"
    )
    variables = inject(tmp_path / "inject")
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | variables, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        time.sleep(0.6)
        kill_one(Family.of(started.pid))
        assert started.stdout.read() == ""
