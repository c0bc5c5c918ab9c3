"""Signals that ask training to stop: it saves at the end of the step and exits with the code of the signal.

SIGTERM and SIGUSR1 come from a cluster that wants its node back (75: requeue), SIGINT from a person at the keyboard (130);
a second SIGINT stops at once. A signal may reach one rank alone; the ranks agree on the step in the guard's all-reduce.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from vaescale.errors import Preempted
from vaescale.system import early_stop

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Handlers of these signals: `with Preemption(shown=True) as preemption: ... preemption.asked()`."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self.signal: signal.Signals | None = None
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self.signal is not None

    def __enter__(self) -> "Preemption":
        # A signal always finds a handler, the early one's or this one's.
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._before |= early_stop.hand_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = kind is not None and issubclass(kind, Preempted)
        for number, handler in self._before.items():
            # srun sends another SIGTERM once the first task has ended, which must not replace this one's exit code.
            signal.signal(number, signal.SIG_IGN if ending and number != signal.SIGINT else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        # A launcher sends a SIGTERM of its own after a person's Ctrl-C, which takes precedence.
        self.signal = signal.SIGINT if self._interrupted else signal.Signals(number)
        if self._shown:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            message = f"{signal.Signals(number).name}: saving after this step{again}\n"
            os.write(2, message.encode())  # a handler may have interrupted a write to sys.stderr
