"""Which processes a rank ends that gave up on them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaescale.system import exit_codes, siblings

GROUP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "WORLD_SIZE": "4"}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """Starts a process that sleeps, with variables; this process is its launcher and its sibling at once."""
    started: list[subprocess.Popen[bytes]] = []
    for name, value in GROUP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setattr(siblings, "_given_up", set())

    def start(**variables: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], env=os.environ | variables))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_only_the_silent_ranks_of_this_launch_end(start, tmp_path: Path) -> None:
    silent, other = start(RANK="1"), start(RANK="2")
    of_another_launch = start(RANK="1", MASTER_PORT="29502")
    no_rank = start()
    siblings.give_up([1, 3])
    assert siblings.end_silent(4) == [1]
    assert silent.wait(10) == -9
    assert [process.poll() for process in (other, of_another_launch, no_rank)] == [None] * 3
    assert exit_codes.left_for(str(tmp_path), 1) == 4


def test_nobody_ends_unless_given_up(start) -> None:
    other = start(RANK="1")
    assert siblings.end_silent(4) == []
    assert other.poll() is None
