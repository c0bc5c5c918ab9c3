"""Progress: a live line on a terminal, a line every half minute elsewhere, nothing on other ranks."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest

from vaescale.system import console
from vaescale.system.console import Progress, table


@pytest.fixture
def wait(monkeypatch) -> Callable[[float], None]:
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_a_log_file_gets_the_first_a_line_every_half_minute_and_the_last(capsys, wait) -> None:
    with Progress("train", 50, unit="steps", epoch=20) as progress:
        for step in range(1, 51):
            wait(2.0)
            progress.update(step, f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "train  1/50 steps  2%  epoch 1 of 3  0:02 elapsed  loss 1",
        "train  17/50 steps  34%  epoch 1 of 3  0:34 elapsed, 1:06 left  loss 17",
        "train  33/50 steps  66%  epoch 2 of 3  1:06 elapsed, 0:34 left  loss 33",
        "train  49/50 steps  98%  epoch 3 of 3  1:38 elapsed, 0:02 left  loss 49",
        "train  50/50 steps  100%  epoch 3 of 3  1:40 elapsed  loss 50",
    ]


def test_the_first_step_does_not_tell_the_rest(wait) -> None:
    progress = Progress("train", 11)
    wait(60.0)  # compiling
    progress.update(1)
    assert progress.text().endswith("1:00 elapsed")
    wait(1.0)
    progress.update(2)
    assert "1:01 elapsed, 0:09 left" in progress.text()


def test_the_rest_does_not_grow_during_an_evaluation_and_counts_it_afterwards(wait) -> None:
    progress = Progress("train", 60)
    for step in range(1, 31):
        wait(1.0)
        progress.update(step)
    progress.update(30, "evaluate: 0 of 100", passing=True)
    for image in (50, 100):
        wait(29.0)
        progress.update(30, f"evaluate: {image} of 100", passing=True)
        assert "0:30 left" in progress.text()
    wait(1.0)
    progress.update(31)
    assert "1:29 elapsed, 1:25 left" in progress.text()


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            200,
            "\u2501" * 4
            + "\u2500" * 4
            + "  train x  25/50 steps  epoch 2 of 3  0:25, 0:25 left  neg_elbo -5.00 nats",
        ),
        (78, "train x  25/50 steps  epoch 2 of 3  0:25, 0:25 left  neg_elbo -5.00 nats"),
        (60, "train x  25/50 steps  0:25, 0:25 left  neg_elbo -5.00 nats"),
        (50, "train x  25/50  0:25 left  neg_elbo -5.00 nats"),
    ],
)
def test_a_narrow_terminal_shows_what_matters(width: int, line: str, wait, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress("train x", 50, unit="steps", epoch=20)
    for step in range(1, 26):
        wait(1.0)
        progress.update(step, "neg_elbo -5.00 nats")
    assert str(progress._live.get_renderable()) == line


def test_a_continued_run_is_timed_by_its_own_steps(wait) -> None:
    progress = Progress("train", 1000, start=900)
    for step in (910, 920):
        wait(10.0)
        progress.update(step)
    assert "920/1000  92%  0:20 elapsed, 1:20 left" in progress.text()


def test_an_unknown_total_is_left_out(capsys, wait) -> None:
    with Progress("list", 0, unit="files") as progress:
        wait(5.0)
        progress.update(508)
    assert capsys.readouterr().err == "list  508 files  0:05 elapsed\n"


def test_what_is_on_the_way_is_no_line_at_the_end(capsys, wait) -> None:
    with Progress("train", 50, unit="steps") as progress:
        progress.update(50, "loss 1")
        for image in range(65):
            wait(1.0)
            progress.update(50, f"evaluate: {image} of 65", passing=True)
    assert capsys.readouterr().err.splitlines() == [
        "train  50/50 steps  100%  0:00 elapsed  loss 1",
        "train  50/50 steps  100%  0:31 elapsed  evaluate: 30 of 65",
        "train  50/50 steps  100%  1:02 elapsed  evaluate: 61 of 65",
    ]


def test_what_ends_soon_is_not_shown(capsys, wait) -> None:
    with Progress("list", 0, unit="files", quiet_seconds=2) as progress:
        wait(1.9)
        progress.update(5)
        progress.speak()
        assert capsys.readouterr().err == ""
        wait(0.2)
        progress.update(6)
    assert capsys.readouterr().err == "list  6 files  0:02 elapsed\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (3599, "59:59"), (7325, "2:02:05")]
)
def test_times_are_minutes_and_seconds(seconds: float, shown: str) -> None:
    assert console.clock(seconds) == shown


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
    assert "train  3/3  " in shown
    assert "loss 0.5" in shown, "an empty note leaves the one before"
    assert "\u2501" * console.BAR_WIDTH in shown
    assert done.stdout == b""


@pytest.mark.parametrize("rows", [[], [("a", "1"), ("longer", "2")]])
def test_tables_align(capsys, rows: list[tuple[str, str]]) -> None:
    table("title", rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[1:] == [f"  {name:<6}  {value}" for name, value in rows]
