"""The benches run; what they measure is no test's business."""

import subprocess
import sys
from pathlib import Path

import pytest

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
        (["reader.py", "--count", "200", "--rounds", "1"], ["bare loop", "webdataset, pillow", "npy"]),
    ],
)
def test_it_runs(words: list[str], lines: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", str(BENCH / words[0]), *words[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=BENCH.parents[1]
    )
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert line in done.stdout
