"""The pulse of this process: its step and its activity, for the watchdog, which names what hangs.

The training thread writes it and the watchdog's thread reads it: one tuple, which Python replaces atomically.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Pulse(NamedTuple):
    """What a process does. activity: such as `reading data`; since: monotonic seconds; waits: whether it waits for others."""

    step: int
    activity: str
    since: float
    waits: bool = False


_now = Pulse(0, "starting", time.monotonic())


def at_step(step: int) -> None:
    """Record the start of a step."""
    global _now
    _now = Pulse(step, "computing", time.monotonic())


def beat(activity: str) -> None:
    """Record that this process is alive, and what it does now."""
    global _now
    _now = Pulse(_now.step, activity, time.monotonic())


@contextmanager
def waiting_for_others(activity: str) -> Iterator[None]:
    """Record within the block that this process waits for the others, and for what."""
    global _now
    before = _now.activity
    _now = Pulse(_now.step, activity, time.monotonic(), waits=True)
    try:
        yield
    finally:
        _now = Pulse(_now.step, before, time.monotonic())


def read() -> Pulse:
    """Return the latest pulse."""
    return _now
