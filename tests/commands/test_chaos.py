"""What `vaescale chaos` finds when it compares two runs."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import tiny_recipe
from vaescale.commands import chaos as verb
from vaescale.commands.chaos import KINDS, Setup, _is_explained, _kinds, chaos
from vaescale.errors import UserError
from vaescale.runs.equality import compare, step_seconds
from vaescale.system import faults
from vaescale.system.faults import Family, fill_shared_memory, inject, kill_one, own_shared_memory


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
    result = compare(tmp_path)
    assert (result["steps"], result["rows_lost"]) == (9, 9 - rows)
    assert (result["tensors_differing"], result["bit_equal"]) == (int(weight != 1), weight == 1)
    assert result["checkpoints_passed_over"] == 2


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    """A recipe whose images are read by two processes."""
    content = tiny_recipe(digits, tmp_path / "run")
    content["data"] |= {"workers": 2, "cache": "none"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_kinds_are_those_that_training_can_meet(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "own_shared_memory", lambda: ["unshare"])
    assert _kinds(None, recipe, (), alone=False) == list(KINDS)
    assert set(KINDS) - set(_kinds(None, recipe, (), alone=True)) == {"stop one", "hold lock"}
    assert "full shm" not in _kinds(None, recipe, ("data.workers=0",), alone=True)
    with pytest.raises(UserError, match="--kinds 'stop one' needs several processes"):
        chaos(recipe, kinds=["stop one"], folder=recipe.parent)
    with pytest.raises(UserError, match=r"--kinds 'full shm' needs reading processes; give data\.workers=2"):
        _kinds(["full shm"], recipe, ("data.cache=memory",), alone=True)
    with pytest.raises(UserError, match="--kinds 'kill' is unknown; known: kill all, kill one"):
        chaos(recipe, kinds=["kill"], folder=recipe.parent)


def test_a_fault_that_cannot_be_caused_here_is_said_and_left_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "own_shared_memory", lambda: None)
    monkeypatch.setattr(verb, "is_installed", lambda: False)
    assert set(KINDS) - set(_kinds(None, recipe, (), alone=False)) == {
        "full shm",
        "lost run",
        "artifacts away",
    }
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "the fault 'full shm' is left out: this user cannot mount a /dev/shm for one process (unshare --mount fails), and the "
        "machine's is not filled"
    )
    assert said[1] == "the fault 'lost run' is left out: MLflow is not installed; pip install mlflow"
    with pytest.raises(UserError, match="no fault of --kinds can be caused here"):
        _kinds(["full shm"], recipe, (), alone=False)


@pytest.mark.parametrize(
    ("kind", "backend", "code", "said", "is_explained"),
    [
        ("kill all", "cpu2", -9, "", True),
        ("kill one", None, -9, "", True),
        ("kill one", "cpu2", 1, "train 5/9", False),
        ("terminate", None, 75, "SIGTERM: saving after this step", True),
        ("terminate", None, -15, "", False),
        ("full shm", None, 3, "vaescale train: a reading process", True),
        ("full shm", None, 1, "vaescale train: a\nTraceback (most recent call last):", False),
        ("lost run", None, 75, "asked to stop after step 3", False),
        ("lost run", None, 75, "the run 1 was deleted; a new run\nasked to stop after step 3", True),
    ],
)
def test_an_end_is_explained_by_the_words_of_its_start(
    tmp_path: Path, kind: str, backend: str | None, code: int, said: str, *, is_explained: bool
) -> None:
    setup = Setup(tmp_path, (), backend, None, tmp_path, {}, None)
    assert _is_explained(setup, kind, code, said) is is_explained


def test_the_first_sentence_of_a_start_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "chaos.log"
    path.write_text("vaescale train: of an earlier start\n")
    log = verb._Log(path)
    log.note(1.0)
    assert log.sentence_at is None
    with path.open("a") as file:
        file.write("train 5/9\nSIGTERM: saving after this step\n")
    log.note(2.0)
    log.note(3.0)
    assert log.sentence_at == 2.0
    assert log.new().startswith("train 5/9")


def test_a_full_shared_memory_is_that_of_the_process_alone(tmp_path: Path) -> None:
    words = own_shared_memory()
    if words is None:
        pytest.skip("a /dev/shm cannot be mounted here")
    script = "until [ -e go ]; do sleep 0.01; done; echo x > /dev/shm/new || echo full > said; [ -e /dev/shm/full ]"
    with subprocess.Popen([*words, "sh", "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL) as started:
        filling = threading.Thread(target=fill_shared_memory, args=(Family.of(started.pid),))
        filling.start()
        own = Path(f"/proc/{started.pid}/root/dev/shm")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if (own / "full").exists() and not os.statvfs(own).f_bavail:
                break
            time.sleep(0.01)
        assert not os.path.exists("/dev/shm/full")  # noqa: S108
        (tmp_path / "go").touch()
        assert started.wait(20) == 0
    filling.join(20)
    assert not filling.is_alive()
    assert (tmp_path / "said").read_text() == "full\n"


def test_a_launcher_has_no_rank_until_it_starts_one() -> None:
    """It is not the process to stop or to hang: nobody would notice."""
    assert Family.of(os.getpid(), launched=True).ranks == []
    assert Family.of(os.getpid()).ranks == [os.getpid()]


def test_a_signal_comes_once_it_is_caught() -> None:
    signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert faults._is_caught(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    assert not faults._is_caught(os.getpid(), signal.SIGUSR2)


def test_damage_is_one_bit_or_a_lost_end(tmp_path: Path) -> None:
    path, chance, seen = tmp_path / "file", random.Random(0), set()  # noqa: S311
    for _ in range(20):
        path.write_bytes(bytes(64))
        seen.add(kind := faults.damage(path, chance))
        content = path.read_bytes()
        if kind == "truncate":
            assert content == bytes(len(content))
            assert len(content) < 64
        else:
            assert len(content) == 64
            assert sum(byte.bit_count() for byte in content) == 1
    assert seen == {"flip a bit", "truncate"}


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a start that does not end, nor when this process is asked to stop."""

    def start(*_: object) -> "subprocess.Popen[bytes]":
        """As torch's launcher does: the child is in a session of its own."""
        words = ["sh", "-c", "setsid sleep 60 & wait"]
        return subprocess.Popen(words, start_new_session=True, env=os.environ | inject(tmp_path / "inject"))

    def wait_for_ever(family: Family) -> None:
        families.append(Family.of(family.first))

    families: list[Family] = []
    monkeypatch.setattr(verb, "ENDS_WITHIN", 0.1)
    (tmp_path / "chaos.log").touch()
    setup = Setup(tmp_path, (), None, None, tmp_path, {"kill all": wait_for_ever}, None)
    with pytest.raises(UserError, match=r"did not end within 0\.1 s after the fault 'kill all'"):
        verb._disturb(setup, start(), "kill all", 0.3, verb._Log(tmp_path / "chaos.log"))
    assert len(families[0].all) == 2
    deadline = time.monotonic() + 10
    while any(faults.runs(process) for process in families[0].all):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(verb, "_start", start)
    asking = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    asking.start()
    with pytest.raises(SystemExit) as ended, verb._ended_by_sigterm():
        verb._trained(setup, "peace", 60)
    assert ended.value.code == 143


def test_useful_time_is_that_of_the_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "time": 0.0, "train/mse": 1.0, "perf/step_seconds": 0.5} for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step_seconds(tmp_path) == 1.5


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
