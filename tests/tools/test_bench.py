"""The benches run; what they measure is no test's business."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vaescale.data.latent_shards import write_latent_index, write_latents

BENCH = Path(__file__).parents[2] / "tools" / "bench"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["plan.py"],
            [
                "imagenet: 1,281,167 samples",
                "1e9: 1,000,000,000 samples",
                "resume at any step",
                "a step of a mixture",
            ],
        ),
        (["operations.py", "recipes/digits/optimal.yaml"], ["digits-optimal", "noise", "all"]),
        (["reader.py", "--count", "130", "--rounds", "1"], ["bare loop", "webdataset, pillow", "npy"]),
    ],
)
def test_it_runs(run, words: list[str], lines: list[str]) -> None:
    printed = run(*words)
    for line in lines:
        assert line in printed


def test_the_bench_of_checkpointing_runs() -> None:
    """As a program, because it measures the peak memory of its process."""
    words = ["-W", "ignore", str(BENCH / "checkpointing.py"), "recipes/digits/ladder.yaml", "--images", "4"]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=BENCH.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "checkpointing false" in done.stdout
    assert "with checkpointing:" in done.stdout


def test_the_mixture_s_bench_runs(run, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        moments = generator.normal(size=(600, 2, 4)).astype(np.float32)
        keys, labels = [f"{number}" for number in range(600)], np.full(600, -1)
        folder = tmp_path / split
        shard = write_latents(folder, "shard-000000.tar", keys=keys, labels=labels, moments=moments)
        write_latent_index(folder, [shard], (), {"latent_shape": [4]})
    printed = run("gmm.py", str(tmp_path), "--components", "2", "--rounds", "1", "--whole")
    for line in ("an iteration", "online against", "start to end", "in memory"):
        assert line in printed


@pytest.mark.usefixtures("one_core")
def test_the_decoders_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On one process and core, with a few small images. As a program it goes on with two, from which it cannot return."""
    from accelerate.state import AcceleratorState

    from tools.bench import sigma

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sigma, "GLOBAL_BATCH", 8)
    monkeypatch.setattr(sigma, "SIZE", 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sigma.measure(1, "predicted")
    printed = capsys.readouterr().out
    assert "1 process," in printed
    assert "gaussian, predicted" in printed


def test_the_step_of_the_gpu_s_bench_runs(tmp_path: Path) -> None:
    """Its cases on a CPU, where nothing is captured and no kernels are counted."""
    from accelerate.state import AcceleratorState

    from tools.bench import gpu_training as bench

    AcceleratorState._reset_state(True)
    case = bench.Case("digits/ladder.yaml", 4)
    rows = dict(bench.measure(case, [bench.PLAIN, "recipe"], tmp_path, torch.device("cpu")))
    assert list(rows) == [bench.PLAIN, "recipe"]
    for measured in rows.values():
        assert measured.images == 4
        assert measured.seconds > 0
        assert measured.flops == rows["recipe"].flops > 1e6


def test_the_steps_of_the_choices_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its processes, in this one."""
    from accelerate.state import AcceleratorState

    from tools.bench import choices

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(choices, "keep_freed_pages", lambda: None)
    own, other = multiprocessing.Pipe()
    own.send(0.0)
    own.send(None)
    choices._serve(other, BENCH.parents[1] / "recipes/digits/optimal.yaml", 4, "[B, H, W, C]")
    assert own.recv() is None  # built
    times = own.recv()
    assert len(times) == choices.LEAST
    assert min(times) > 0


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench takes all cores. Beside other tests, its threads would wait for each other, busily."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture
def run(
    one_core: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a bench in this process and returns what it prints."""

    def run_bench(name: str, *words: str) -> str:
        monkeypatch.chdir(BENCH.parents[1])
        monkeypatch.setattr(sys, "argv", [name, *words])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(BENCH / name), run_name="__main__")
        return capsys.readouterr().out

    return run_bench
