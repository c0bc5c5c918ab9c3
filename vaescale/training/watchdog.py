"""Ends a run that hangs, and says which rank hangs, at which step and in what.

Each rank tells the others every few seconds, through the launcher's key-value store, where it is. The rank that nobody
hears of, or that computes while the others wait for it, is the one to look at.
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
from vaescale.system import heartbeat
from vaescale.system.console import say

LOOKS = 10  # within the bound
SILENT = 3  # looks


class Heard(NamedTuple):
    """What a rank told last: the message's number, when it came, and where the rank was."""

    told: int
    at: float
    pulse: heartbeat.Pulse


class Watchdog:
    """`with Watchdog(bound_seconds):` watches this process's pulse from a thread; None watches nothing.

    end: what is called with the exit code; the main thread hangs, so that nothing less than the process's end would do.
    """

    def __init__(
        self, bound_seconds: float | None, *, end: Callable[[int], Any] = os._exit, store: Any = None
    ) -> None:
        self._bound, self._end, self._store = bound_seconds, end, _store() if store is None else store
        self._every = min(5.0, (bound_seconds or 0) / LOOKS)
        self._stop = threading.Event()
        self._heard: dict[int, Heard] = {}
        self._told, self._answered = 0, time.monotonic()
        # Two threads: when the network is cut, the store itself hangs.
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
        """Tell the others where this rank is, and hear where they are."""
        while self._store is not None:
            try:
                step, place, since, waits = heartbeat.read()
                self._told += 1
                own = [self._told, step, place, time.monotonic() - since, waits]
                self._store.set(f"pulse/{comm.rank()}", json.dumps(own))
                for rank in range(comm.world_size()):
                    if rank != comm.rank() and self._store.check([f"pulse/{rank}"]):
                        self._hear(rank, *json.loads(self._store.get(f"pulse/{rank}")))
                self._answered = time.monotonic()
            except RuntimeError:  # the store went with the rank that kept it
                return
            if self._stop.wait(self._every):
                return

    def _hear(self, rank: int, told: int, step: int, place: str, seconds: float, waits: bool) -> None:
        """What a rank tells: the number of its message tells a new one from an old one, its clock is its own."""
        before = self._heard.get(rank)
        now = time.monotonic()
        if before is None or before.told != told:
            self._heard[rank] = Heard(told, now, heartbeat.Pulse(step, place, now - seconds, waits))

    def _sentence(self) -> str:
        """Where everybody is; the suspects first."""
        own, now = heartbeat.read(), time.monotonic()
        heard = {comm.rank(): Heard(0, now, own)} | dict(self._heard)
        newest = max(one.pulse.step for one in heard.values())
        missing = [rank for rank in range(comm.world_size()) if rank not in heard]
        silent = [rank for rank, one in heard.items() if now - one.at > SILENT * self._every + 1]
        behind = [rank for rank, one in heard.items() if one.pulse.step < newest]
        busy = [rank for rank, one in heard.items() if not one.pulse.waits]
        words = []
        for rank in (missing or silent or behind or busy or sorted(heard))[:8]:
            if rank in missing:
                words.append(f"rank {rank} was never heard of")
                continue
            at, (step, place, since, _) = heard[rank].at, heard[rank].pulse
            if rank in silent:
                words.append(f"rank {rank} not heard of for {now - at:.0f} s, last at step {step} in {place}")
            else:
                words.append(f"rank {rank} has been at step {step} in {place} for {now - since:.0f} s")
        if self._store is not None and now - self._answered > SILENT * self._every + 1:
            words.append("the launcher's store, on rank 0's host, does not answer")
        return (
            f"no sign of life for {self._bound:.0f} s (training.watchdog_seconds): {'; '.join(words)}; this rank is at step "
            f"{own.step} in {own.place}; the same command goes on from the last checkpoint"
        )


def _store() -> Any:
    """A connection of our own to the launcher's store: the one that collectives use may be busy waiting."""
    if comm.world_size() == 1:
        return None
    from torch.distributed import distributed_c10d

    own: Any = distributed_c10d._get_default_store()
    return distributed_c10d.PrefixStore("vaescale", own.clone())
