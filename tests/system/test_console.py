"""Progress: a bar on a terminal, a line every so often elsewhere, nothing on other ranks."""

import os
import pty
import subprocess
import sys

import pytest

from vaescale.system import console
from vaescale.system.console import Progress, table


def test_a_log_file_gets_a_line_every_so_often_and_the_last(capsys, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Progress("train", 50) as progress:
        for step in range(1, 51):
            now += 1.0
            progress.update(step, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 1/50  loss 1"
    assert lines[1] == "train 12/50  loss 12", "after more than ten seconds"
    assert lines[-1] == "train 50/50  loss 50"
    assert len(lines) == 6


def test_what_is_on_the_way_is_no_line_at_the_end(capsys, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Progress("train", 50) as progress:
        progress.update(50, "loss 1")
        for image in range(25):
            now += 1.0
            progress.update(50, f"evaluate: {image} of 25", passing=True)
    assert capsys.readouterr().err.splitlines() == [
        "train 50/50  loss 1",
        "train 50/50  evaluate: 10 of 25",
        "train 50/50  evaluate: 21 of 25",
    ]


def test_what_ends_soon_is_not_shown(capsys, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Progress("list", 0, quiet_seconds=2) as progress:
        now += 1.9
        progress.update(5, "files")
        assert capsys.readouterr().err == ""
        now += 0.2
        progress.update(6, "files")
    assert capsys.readouterr().err == "list 6/?  files\n"


def test_other_ranks_are_silent(capsys) -> None:
    with Progress("train", 2, shown=False) as progress:
        progress.update(2, "loss")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    code = (
        "from vaescale.system.console import Progress\n"
        "with Progress('train', 3, start=1) as progress:\n"
        "    progress.update(2, 'loss 0.5')\n    progress.update(3)\n"
    )
    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=child,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        check=True,
    )
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert "3/3" in shown
    assert "loss 0.5" in shown, "an empty note leaves the one before"
    assert done.stdout == b""


@pytest.mark.parametrize("rows", [[], [("a", "1"), ("longer", "2")]])
def test_tables_align(capsys, rows: list[tuple[str, str]]) -> None:
    table("title", rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[1:] == [f"  {name:<6}  {value}" for name, value in rows]
