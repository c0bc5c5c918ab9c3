"""The launcher of a node's ranks: what it says of a rank that ended, and the code that it ends with."""

import logging
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import accelerate.commands.launch
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vaescale.system import exit_codes
from vaescale.training import ranks

WORDS = ["--num_processes", "2", "-m", "vaescale", "train", "recipe.yaml", "--json"]
ELASTIC = ("multiprocessing.api", "agent.server.api")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process does not end with its parent, and keeps its levels of logging."""
    monkeypatch.setattr(ranks, "follow_parent", lambda _: None)
    monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    loggers = [logging.getLogger(f"torch.distributed.elastic.{part}") for part in ELASTIC]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def failed(code: int) -> ChildFailedError:
    return ChildFailedError("vaescale", {1: ProcessFailure(1, 7, code, "")})


@pytest.mark.parametrize(
    ("error", "left", "code", "said"),
    [
        (None, "", 0, ""),
        (failed(2), "2", 2, ""),  # the rank has said why
        (failed(1), "", 1, "rank 1 (process 7) ended with exit code 1\n"),
        (failed(-9), "4", 4, ""),  # another rank ended it, and has said why
        (failed(-9), "", 137, "rank 1 (process 7) was killed by SIGKILL, perhaps for want of memory"),
        (failed(-11), "", 139, "rank 1 (process 7) was killed by SIGSEGV\n"),
        (failed(-15), "", 143, ""),  # the launcher knows who asked
        (failed(143), "", 143, ""),
        (subprocess.CalledProcessError(3, "python"), "", 3, "rank 0 ended with exit code 3\n"),
        (SignalException("", signal.SIGINT), "", 130, ""),
    ],
)
def test_how_a_rank_ended(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: Exception | None,
    left: str,
    code: int,
    said: str,
) -> None:
    if left:
        (tmp_path / "1").write_text(left)

    def launch(arguments: object) -> None:
        assert arguments.num_processes == 2  # type: ignore[attr-defined]
        assert arguments.training_script_args == ["train", "recipe.yaml", "--json"]  # type: ignore[attr-defined]
        assert arguments.log_dir == str(tmp_path / "logs")  # type: ignore[attr-defined]
        if error is not None:
            raise error

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launch)
    assert ranks.main(WORDS) == code
    err = capfd.readouterr().err
    assert err.startswith(f"vaescale launch: {said}") if said else err == ""
