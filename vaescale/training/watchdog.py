"""A watchdog that ends a hanging run, and names the rank that hangs, its step and its activity.

Every few seconds each rank publishes its step and activity in the launcher's key-value store. The rank to look at is the one
that the others do not hear from, or that computes while the others wait for it.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from vaescale import comm
from vaescale.errors import TrainingStopped
from vaescale.system import exit_codes, heartbeat
from vaescale.system.console import say

CHECKS = 10  # within the bound
SILENT_CHECKS = 3  # without a message, after which a rank counts as silent


class Heard(NamedTuple):
    """The last message of a rank: its number, when it arrived, and the rank's pulse."""

    number: int
    at: float
    pulse: heartbeat.Pulse


def _exit(code: int) -> None:
    os._exit(exit_codes.leave(code))


class Watchdog:
    """A thread that watches this process's pulse: `with Watchdog(bound_seconds):`. A bound of None watches nothing.

    end: called with the exit code. It ends the process, because nothing else stops a main thread that hangs.
    """

    def __init__(
        self, bound_seconds: float | None, *, end: Callable[[int], Any] = _exit, store: Any = None
    ) -> None:
        self._bound, self._end, self._store = bound_seconds, end, _store() if store is None else store
        self._every = min(5.0, (bound_seconds or 0) / CHECKS)
        self._stop = threading.Event()
        self._heard: dict[int, Heard] = {}
        self._num_sent, self._answered = 0, time.monotonic()
        # Two threads, because the store itself hangs when the network is cut.
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watchdog-{work.__name__}")
            for work in (self._watch, self._exchange)
        ]

    def __enter__(self) -> "Watchdog":
        heartbeat.beat("starting")
        if self._bound is not None:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        assert self._bound is not None
        while not self._stop.wait(self._every):
            if time.monotonic() - heartbeat.read().since > self._bound:
                say(f"vaescale train: rank {comm.rank()}: {self._sentence()}")
                self._end(TrainingStopped.exit_code)
                return

    def _exchange(self) -> None:
        """Publish this rank's pulse, and read the other ranks' pulses."""
        while self._store is not None:
            try:
                step, activity, since, waits = heartbeat.read()
                self._num_sent += 1
                message = [self._num_sent, step, activity, time.monotonic() - since, waits]
                self._store.set(f"pulse/{comm.rank()}", json.dumps(message))
                for rank in range(comm.world_size()):
                    if rank != comm.rank() and self._store.check([f"pulse/{rank}"]):
                        self._hear(rank, *json.loads(self._store.get(f"pulse/{rank}")))
                self._answered = time.monotonic()
            except RuntimeError:  # the store ended with the rank that held it
                return
            if self._stop.wait(self._every):
                return

    def _hear(self, rank: int, number: int, step: int, activity: str, seconds: float, waits: bool) -> None:
        """Store a rank's message, unless its number is the last one's. `seconds` is an age, because clocks differ."""
        before = self._heard.get(rank)
        now = time.monotonic()
        if before is None or before.number != number:
            self._heard[rank] = Heard(number, now, heartbeat.Pulse(step, activity, now - seconds, waits))

    def _sentence(self) -> str:
        """The message: where the suspected ranks are, and where this rank is."""
        pulse, now = heartbeat.read(), time.monotonic()
        heard = {comm.rank(): Heard(0, now, pulse)} | dict(self._heard)
        newest = max(message.pulse.step for message in heard.values())
        missing = [rank for rank in range(comm.world_size()) if rank not in heard]
        silent = [
            rank for rank, message in heard.items() if now - message.at > SILENT_CHECKS * self._every + 1
        ]
        behind = [rank for rank, message in heard.items() if message.pulse.step < newest]
        busy = [rank for rank, message in heard.items() if not message.pulse.waits]
        phrases = []
        for rank in (missing or silent or behind or busy or sorted(heard))[:8]:
            if rank in missing:
                phrases.append(f"rank {rank} was never heard from")
                continue
            at, (step, activity, since, _) = heard[rank].at, heard[rank].pulse
            if rank in silent:
                phrases.append(
                    f"rank {rank} not heard from for {now - at:.0f} s, last at step {step} in {activity}"
                )
            else:
                phrases.append(f"rank {rank} has been at step {step} in {activity} for {now - since:.0f} s")
        if self._store is not None and now - self._answered > SILENT_CHECKS * self._every + 1:
            phrases.append("the launcher's store, on rank 0's host, does not answer")
        return (
            f"no sign of life for {self._bound:.0f} s (training.watchdog_seconds): {'; '.join(phrases)}; this rank is at step "
            f"{pulse.step} in {pulse.activity}; the same command continues from the last checkpoint"
        )


def _store() -> Any:
    """A separate connection to the launcher's store, because that of the collectives may be waiting."""
    if comm.world_size() == 1:
        return None
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    return distributed_c10d.PrefixStore("vaescale", store.clone())
