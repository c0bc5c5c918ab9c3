"""The run folder: what several verbs write at once, and the lock of training."""

import errno
import json
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.system import files


def test_two_verbs_write_their_sections_of_the_summary(tmp_path: Path, monkeypatch) -> None:
    """Each would otherwise read the summary before the other writes it."""
    real, both = run_folder.read_json, threading.Barrier(2)

    def read_json(path: Path) -> dict:
        content = real(path)
        try:
            both.wait(timeout=0.5)
        except threading.BrokenBarrierError:
            both.reset()
        return content

    monkeypatch.setattr(run_folder, "read_json", read_json)
    with ThreadPoolExecutor(2) as pool:
        for section in ("gmm", "quality"):
            pool.submit(run_folder.update_summary, tmp_path, section, {"step": 1})
    assert real(tmp_path / "summary.json") == {"gmm": {"step": 1}, "quality": {"step": 1}}
    run_folder.forget_summary(tmp_path, "gmm", "train")
    assert real(tmp_path / "summary.json") == {"quality": {"step": 1}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_stays_locked_gets_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "SUMMARY_WAIT_SECONDS", 0.0)
    with (
        files.exclusive(tmp_path / ".summary.json.lock"),
        pytest.raises(UserError, match="end that process and try again"),
    ):
        run_folder.update_summary(tmp_path, "gmm", {})


def test_metrics_after_a_crash_in_a_line_are_kept(tmp_path: Path) -> None:
    """As when `evaluate` measures a run whose training was killed in the middle of a line."""
    run_folder.append_metrics(tmp_path, 1, {"train/mse": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    run_folder.append_metrics(tmp_path, 2, {"val/mse": 0.25})
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "only one job trains"), ('{"host": "HERE", "pid": 4194304}', "its process 4194304 is gone")],
)
def test_training_goes_on_where_nothing_can_be_locked(
    tmp_path: Path, monkeypatch, capsys, content: str, message: str
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / "lock").write_text(content.replace("HERE", socket.gethostname()))
    with run_folder.locked(tmp_path):
        assert message in capsys.readouterr().err
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()
        with pytest.raises(UserError, match="wait for that job"), run_folder.locked(tmp_path):
            pass
    assert not (tmp_path / "lock").exists()


def test_a_row_of_metrics_holds_numbers_only(tmp_path: Path) -> None:
    run_folder.append_metrics(tmp_path, 1, {"val/mse": 0.5, "val/sigma": math.nan, "val/kl_nats": math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert {name for name in row if "/" in name} == {"val/mse"}
