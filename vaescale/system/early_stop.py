"""A cluster's request to stop, SIGTERM or SIGUSR1, that comes before training has anything to save.

The process ends at once with exit code 75, because the same command starts again. A thread does it: the main thread may wait
for the other processes within a call of C++, which no Python handler interrupts.
"""

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from vaescale.system import exit_codes
from vaescale.system.host import HELD_BACK

TERMINATED = 128 + signal.SIGTERM


def early_code(environment: Mapping[str, str]) -> int:
    """The exit code of a process that is asked to stop before training begins: 75, or 143 in a Slurm step of several tasks.

    srun sends SIGTERM to the other tasks when one has failed, and passes on the largest code of all. A 75 would hide the code
    of a failure, and a job that cannot work would be requeued.
    """
    several = environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_STEP_ID" in environment
    return TERMINATED if several else exit_codes.PREEMPTED


def sentence(name: str, code: int) -> str:
    """What to say of a signal that came too early, and of the exit code."""
    again = (
        "the same command starts again"
        if code == exit_codes.PREEMPTED
        else f"srun sends it after the failure of a task, too: hence exit code {code}, not {exit_codes.PREEMPTED}"
    )
    return f"{name} came before there was anything new to save; {again}"


class EarlyStop:
    """Ends this process when a cluster asks: `early = EarlyStop("vaescale train", shown=True)`, until `early.withdraw()`.

    Only the main thread can receive signals; in another one this does nothing. A rank that `vaescale launch` started ends with
    143 and without a word, since its launcher knows whether a cluster asked or another rank failed. shown: whether it says so.
    """

    active: "EarlyStop | None" = None

    def __init__(self, speaker: str, *, shown: bool) -> None:
        self._code = None if exit_codes.FOLDER in os.environ else early_code(os.environ)
        self._speaker = speaker if shown else ""
        self._pipe: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._noted: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._pipe, EarlyStop.active = writing, self
        threading.Thread(target=self._wait, args=(reading,), daemon=True).start()
        # The handlers last: a signal that one of them takes must find a reader.
        self._wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in HELD_BACK:
            self._before[number] = signal.signal(number, self._note)

    def fail_with(self, code: int) -> None:
        """From now on end with this code and without a word: the process has failed, and waits for another one to say so."""
        self._code, self._speaker = code, ""

    def withdraw(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.hand_over()

    def hand_over(self) -> dict[signal.Signals, Any]:
        """Leave the signals to other handlers, which are in place already. Returns the handlers from before this object's.

        A signal that has come, and that the thread has not seen yet, ends the process here.
        """
        if self._pipe is None:
            return {}
        writing = self._pipe
        self._pipe, EarlyStop.active = None, None
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(writing)  # ends the thread, which closes the other side
        for number in self._noted:
            self._end(number)
        return self._before

    def _wait(self, reading: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # they are the main thread's
        while numbers := os.read(reading, 1):
            if numbers[0] in HELD_BACK and self._pipe is not None:
                self._end(numbers[0])
        os.close(reading)

    def _end(self, number: int) -> None:
        if self._code is not None and self._speaker:
            said = sentence(signal.Signals(number).name, self._code)
            with suppress(OSError):
                os.write(2, f"{self._speaker}: {said}\n".encode())
        os._exit(TERMINATED if self._code is None else exit_codes.leave(self._code))

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Keep the signal from its default action, and remember it; the thread reads its number from the pipe."""
        self._noted.append(number)


def hand_over() -> dict[signal.Signals, Any]:
    """Leave the signals to handlers that are in place. Returns those from before this process answered them early."""
    return EarlyStop.active.hand_over() if EarlyStop.active is not None else {}


def withdraw() -> None:
    """Give the signals back, if this process answers them early."""
    if EarlyStop.active is not None:
        EarlyStop.active.withdraw()
