"""The benches run; what they measure is no test's business."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vaescale.data.latent_shards import write_latent_index, write_latents

BENCH = Path(__file__).parents[2] / "tools" / "bench"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["plan.py"], ["imagenet: 1,281,167 samples", "1e9: 1,000,000,000 samples", "resume at any step"]),
        (
            ["sigma.py", "--rounds", "1", "--only", "predicted"],
            ["1 process,", "2 processes,", "gaussian, predicted"],
        ),
        (
            ["checkpointing.py", "recipes/digits/ladder.yaml", "--images", "4"],
            ["checkpointing false", "with checkpointing:"],
        ),
        (["reader.py", "--count", "130", "--rounds", "1"], ["bare loop", "webdataset, pillow", "npy"]),
    ],
)
def test_it_runs(words: list[str], lines: list[str]) -> None:
    printed = run(*words)
    for line in lines:
        assert line in printed


def test_the_mixture_s_bench_runs(tmp_path: Path) -> None:
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


def run(name: str, *words: str) -> str:
    """What a bench prints."""
    command = [sys.executable, "-W", "ignore", str(BENCH / name), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=BENCH.parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
