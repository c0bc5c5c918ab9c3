"""Faults of real processes: killed, hung, asked to stop, without room on the disk. Each run then goes on to the same end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import ROOT, checkpoints, curve, environment, make_project, train, train_until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OPTIONS = ("training.steps=60", "training.precision=fp32", "training.log_every=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = make_project(tmp_path_factory.mktemp("faults"), digits)
    assert train(folder, *OPTIONS, f"run_dir={folder}/peace").returncode == 0
    return folder


def numbers(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name.startswith("train/")} for row in curve(run)]


@pytest.mark.parametrize(  # SIGTERM: with reading processes, below
    ("send", "code", "words"),
    [
        (signal.SIGUSR1, 75, "asked to stop after step"),
        (signal.SIGINT, 130, "Ctrl-C again stops at once"),
    ],
)
def test_who_asks_to_stop_gets_a_checkpoint_and_a_code(
    project: Path, send: signal.Signals, code: int, words: str
) -> None:
    run = project / f"runs/{send.name}"
    got, said = train_until(project, run, 10, *OPTIONS, send=send)
    assert got == code, said
    assert words in said
    assert "Traceback" not in said
    assert int(checkpoints(run)[-1].removeprefix("step-")) == len(curve(run))
    assert not (run / "lock").exists()
    if send == signal.SIGINT:
        assert (run / "figures" / "curves.png").is_file()
        assert train(project, *OPTIONS, f"run_dir={run}").returncode == 0
        assert numbers(run) == numbers(project / "peace")


def test_reading_processes_outlive_the_signal(project: Path) -> None:
    """A cluster signals every process of a job, those that read data too."""
    run = project / "runs/readers"
    options = (*OPTIONS, "data.cache=none", "data.workers=2")
    command = [sys.executable, "-m", "vaescale", "train", "recipes/digits/optimal.yaml", *options]
    with (project / "readers.log").open("w") as log:
        started = subprocess.Popen(
            [*command, "tracking.mlflow=null", f"run_dir={run}"],
            cwd=project,
            env=environment(),
            stderr=log,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        while started.poll() is None and len(curve(run)) < 10:
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGTERM)
        assert started.wait(60) == 75, (project / "readers.log").read_text()
    said = (project / "readers.log").read_text()
    assert "asked to stop after step" in said
    assert "Traceback" not in said
    assert int(checkpoints(run)[-1].removeprefix("step-")) == len(curve(run))
    assert not (run / "lock").exists()
    assert train(project, *options, f"run_dir={run}").returncode == 0
    assert numbers(run) == numbers(project / "peace")


LEAVES = """
import sys
from vaescale.data.loader import evaluation_batches
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
config = DataConfig(train=sys.argv[1], val=sys.argv[1], image_size=8, channels=1, global_batch=32, cache="none", workers=2)
reader = open_reader(config.train, config)
batches = evaluation_batches(reader, batch=10, rank=0, world_size=1, workers=2)
next(batches)
sys.kept = batches  # and nobody closes it
"""


def test_readers_that_nobody_ends_do_not_keep_python_from_leaving(digits: Path) -> None:
    """They ignore SIGTERM, with which Python would end them at its exit, and then it would wait for them for ever."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, str(digits / "val")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_hung_rank_is_named_and_the_run_ends(project: Path) -> None:
    run, bound = project / "runs/hung", 6
    begun = time.monotonic()
    options = (*OPTIONS, "training.steps=100000", f"training.watchdog_seconds={bound}")
    code, said = train_until(
        project,
        run,
        10,
        *options,
        backend="cpu2",
        send=signal.SIGSTOP,
        to_rank=1,
        kill_when="no sign of life",
    )
    assert code != 0
    (sentence,) = [line for line in said.splitlines() if "no sign of life" in line]
    assert f"no sign of life for {bound} s" in sentence
    assert re.search(r"rank 1 not heard from for \d+ s, last at step \d+ in \w+", sentence), sentence
    assert re.search(r"this rank is at step \d+ in ", sentence)
    assert time.monotonic() - begun < 60


def test_a_killed_rank_ends_the_run_and_nothing_is_lost(project: Path) -> None:
    run = project / "runs/killed"
    options = (*OPTIONS, "training.checkpoint_every=10")
    code, _ = train_until(project, run, 25, *options, backend="cpu2", send=signal.SIGKILL, to_rank=0)
    assert code != 0
    assert checkpoints(run)
    outcome = train(project, *options, f"run_dir={run}", backend="cpu2")
    assert outcome.returncode == 0, outcome.stderr
    for own, peace in zip(numbers(run), numbers(project / "peace"), strict=True):
        for name in ("train/neg_elbo_nats", "train/sigma"):
            assert own[name] == pytest.approx(peace[name], rel=1e-4)


def test_chaos_reports_that_nothing_was_lost(project: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), "recipes/digits/optimal.yaml", "--json"]
    options = ["training.steps=60", "training.precision=fp32", "training.checkpoint_every=10"]
    options += ["--kinds", "kill all,kill one,terminate,slow one"]
    done = subprocess.run(
        [
            *command,
            *options,
            "training.keep_checkpoints=3",
            "--faults",
            "2",
            "--folder",
            str(project / "chaos"),
        ],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"bit_equal": true' in done.stdout
    assert '"rows_lost": 0' in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_with_one_sentence_and_goes_on_with_room(project: Path, small_disk: Path) -> None:
    """Two checkpoints fit, a third does not while both are kept."""
    run = small_disk / "run"
    options = (*OPTIONS, "training.checkpoint_every=10", "training.keep_checkpoints=20")
    outcome = train(project, *options, f"run_dir={run}")
    assert outcome.returncode == 4, outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert "a checkpoint takes" in last
    assert "make room and run the same command again" in last
    assert "Traceback" not in outcome.stderr
    assert checkpoints(run)
    again = train(project, *options, f"run_dir={run}")
    assert again.returncode == 4, "and stays stopped without room"
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    outcome = train(project, *options, f"run_dir={run}")
    assert outcome.returncode == 0, outcome.stderr
    assert numbers(run) == numbers(project / "peace")
