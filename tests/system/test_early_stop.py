"""A request to stop before training has anything to save."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaescale.system import early_stop, exit_codes
from vaescale.system.early_stop import EarlyStop, early_code
from vaescale.training.preemption import Preemption


class Ends:
    """The codes with which the process would have ended."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self._arrived = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self._arrived.set()

    def arrived(self) -> bool:
        """Whether the process has ended, within ten seconds."""
        return self._arrived.wait(10)

    def ask(self, number: signal.Signals) -> list[int]:
        """Send a signal to this process, and wait until the thread has answered it. Returns the codes."""
        os.kill(os.getpid(), number)
        assert self._arrived.wait(10)
        return self.codes


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    ends, before = Ends(), [signal.getsignal(number) for number in early_stop.HELD_BACK]
    monkeypatch.setattr(early_stop.os, "_exit", ends)
    for name in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", exit_codes.FOLDER):
        monkeypatch.delenv(name, raising=False)
    yield ends
    early_stop.withdraw()
    assert [signal.getsignal(number) for number in early_stop.HELD_BACK] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_before_training_ends_with_75_and_a_sentence(
    ends: Ends, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    EarlyStop("vaescale train", shown=True)
    assert ends.ask(number) == [75]
    expected = f"vaescale train: {number.name} came before there was anything new to save; the same command starts again\n"
    assert capfd.readouterr().err == expected


def test_a_task_of_srun_does_not_hide_the_failure_of_another(
    ends: Ends, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    EarlyStop("vaescale train", shown=True)
    assert ends.ask(signal.SIGTERM) == [143]
    assert "hence exit code 143, not 75" in capfd.readouterr().err
    assert early_code({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == 75


def test_a_rank_that_failed_keeps_its_code(
    ends: Ends, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It waits for the first rank to speak, whose end makes the launcher send a SIGTERM."""
    monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    early = EarlyStop("vaescale train", shown=True)
    early.fail_with(2)
    assert ends.ask(signal.SIGTERM) == [2]
    assert exit_codes.collect(tmp_path) == 2
    assert capfd.readouterr().err == ""


def test_a_rank_leaves_the_decision_to_its_launcher(
    ends: Ends, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    EarlyStop("vaescale train", shown=True)
    assert ends.ask(signal.SIGTERM)[0] == 143
    assert exit_codes.collect(tmp_path) is None
    assert capfd.readouterr().err == ""


def test_training_takes_the_signals_over(ends: Ends) -> None:
    EarlyStop("vaescale train", shown=True)
    with Preemption(shown=False) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked()
    assert ends.codes == []


def test_a_request_is_not_lost_while_the_handlers_are_set(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes right after each handler is in place, as on a busy machine."""
    set_handler, sent = signal.signal, []

    def slow(number: signal.Signals, handler: object) -> object:
        before = set_handler(number, handler)
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return before

    monkeypatch.setattr(early_stop.signal, "signal", slow)
    EarlyStop("vaescale train", shown=True)
    assert ends.arrived()
    assert ends.codes[0] == 75


@pytest.mark.parametrize("leave", [early_stop.withdraw, early_stop.hand_over])
def test_a_request_is_not_lost_when_training_takes_over(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, leave
) -> None:
    """It has been taken by the handler, and the thread has not read it yet."""
    monkeypatch.setattr(EarlyStop, "_wait", lambda *_: None)
    early = EarlyStop("vaescale train", shown=False)
    os.kill(os.getpid(), signal.SIGTERM)
    if leave is early_stop.hand_over:
        before = leave()
        for number, handler in before.items():
            signal.signal(number, handler)
    else:
        leave()
    assert ends.codes == [75]
    assert EarlyStop.active is None
    assert early._pipe is None


def test_a_signal_always_has_a_handler(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the early answer to training's own, the default action, death without a word, is never in place."""
    EarlyStop("vaescale train", shown=True)
    set_handler = signal.signal

    def checked(number: signal.Signals, handler: object) -> object:
        assert handler is not signal.SIG_DFL
        return set_handler(number, handler)

    with monkeypatch.context() as patched:
        patched.setattr(early_stop.signal, "signal", checked)
        preemption = Preemption(shown=False).__enter__()
    assert signal.getsignal(signal.SIGTERM) == preemption._note
    preemption.__exit__(None, None, None)
