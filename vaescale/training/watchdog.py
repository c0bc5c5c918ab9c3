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
from typing import Any

from vaescale import comm, pulse
from vaescale.console import say
from vaescale.errors import TrainingStopped

LOOKS = 10  # within the bound
SILENT = 3  # looks


class Watchdog:
    """`with Watchdog(bound_seconds):` watches this process's pulse from a thread; None watches nothing.

    end: what is called with the exit code; the main thread hangs, so that nothing less than the process's end would do.
    """

    def __init__(
        self, bound_seconds: float | None, *, end: Callable[[int], Any] = os._exit, store: Any = None
    ) -> None:
        self._bound, self._end, self._store = bound_seconds, end, store or _store()
        self._every = min(5.0, (bound_seconds or 0) / LOOKS)
        self._stop = threading.Event()
        self._heard: dict[int, tuple[float, pulse.Pulse]] = {}
        # Two threads: when the network is cut, the store itself hangs.
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watchdog-{work.__name__}")
            for work in (self._watch, self._exchange)
        ]

    def __enter__(self) -> "Watchdog":
        pulse.beat("starting")
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
            if time.time() - pulse.read().since > self._bound:
                say(f"vaescale train: rank {comm.rank()}: {self._sentence()}")
                self._end(TrainingStopped.exit_code)
                return

    def _exchange(self) -> None:
        """Tell the others where this rank is, and hear where they are."""
        while self._store is not None:
            try:
                self._store.set(f"pulse/{comm.rank()}", json.dumps([time.time(), *pulse.read()]))
                for rank in range(comm.world_size()):
                    if rank != comm.rank() and self._store.check([f"pulse/{rank}"]):
                        told, *at = json.loads(self._store.get(f"pulse/{rank}"))
                        self._heard[rank] = (float(told), pulse.Pulse(*at))
            except RuntimeError:  # the store went with the rank that kept it
                return
            if self._stop.wait(self._every):
                return

    def _sentence(self) -> str:
        """Where everybody is; the suspects first."""
        own = pulse.read()
        places = {comm.rank(): (time.time(), own)} | dict(self._heard)
        silent = [r for r, (told, _) in places.items() if time.time() - told > SILENT * self._every + 2]
        missing = [r for r in range(comm.world_size()) if r not in places]
        busy = [r for r, (_, at) in places.items() if not at.waits]
        behind = [r for r, (_, at) in places.items() if at.step < max(at.step for _, at in places.values())]
        suspects = missing or silent or behind or busy or sorted(places)
        words = []
        for rank in suspects[:8]:
            if rank not in places:
                words.append(f"rank {rank} was never heard of")
                continue
            told, at = places[rank]
            how = f"not heard of for {time.time() - told:.0f} s, last" if rank in silent else "has been"
            words.append(f"rank {rank} {how} at step {at.step} in {at.place} for {told - at.since:.0f} s")
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
