"""Where this process is: the step, and what it is doing there. For the watchdog, which must name who hangs and in what.

Written by the one thread that trains and read by another, as one tuple, which Python replaces at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Pulse(NamedTuple):
    """place: such as `reading data`; since: seconds of a clock that nobody sets; waits: whether it is waiting for others."""

    step: int
    place: str
    since: float
    waits: bool = False


_now = Pulse(0, "starting", time.monotonic())


def at_step(step: int) -> None:
    """A new step has begun."""
    global _now
    _now = Pulse(step, "computing", time.monotonic())


def beat(place: str) -> None:
    """This process is alive, and does this now."""
    global _now
    _now = Pulse(_now.step, place, time.monotonic())


@contextmanager
def waiting_for_others(place: str) -> Iterator[None]:
    """Within, the process can only go on when the others come, too."""
    global _now
    before = _now.place
    _now = Pulse(_now.step, place, time.monotonic(), waits=True)
    try:
        yield
    finally:
        _now = Pulse(_now.step, before, time.monotonic())


def read() -> Pulse:
    """The latest pulse."""
    return _now
