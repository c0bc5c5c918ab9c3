"""The voice of a verb: no verb is silent for long, whatever it does.

A thread writes what the verb was asked to do if nothing was written within the first seconds, such as while libraries are loaded or
a remote index is fetched, and later, every half minute, the line of the progress display in use or what the process does.
"""

import threading
import time
from types import TracebackType

from vaescale.system import console, heartbeat
from vaescale.system.console import Progress, clock, say

FIRST_SECONDS = 3.0
LOOK_EVERY_SECONDS = 0.5


class Voice:
    """Within `with Voice("vaescale evaluate runs/x", shown=True):` stderr has a line at least every half minute.

    verb: what was asked for. shown: true on the first process only.
    """

    def __init__(self, verb: str, *, shown: bool = True) -> None:
        self._verb, self._shown = verb, shown
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="voice", daemon=True)
        self._begun = time.monotonic()

    def _speak(self) -> None:
        """Look every half second whether it has been silent for too long."""
        while not self._ended.wait(LOOK_EVERY_SECONDS):
            now = time.monotonic()
            has_spoken = console.LAST["spoken"] > self._begun
            most = console.LINE_EVERY_SECONDS if has_spoken else FIRST_SECONDS
            if now - max(self._begun, console.LAST["spoken"]) < most:
                continue
            if not has_spoken:
                say(f"{self._verb}: {heartbeat.read().activity}")
            elif Progress.active:
                Progress.active[-1].speak()
                console.LAST["spoken"] = now  # on a terminal the live line speaks
            else:
                say(f"{self._verb}: {heartbeat.read().activity}, {clock(now - self._begun)} elapsed")

    def __enter__(self) -> "Voice":
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
