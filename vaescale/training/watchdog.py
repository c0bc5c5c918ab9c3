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
from vaescale.system import exit_codes, heartbeat, siblings
from vaescale.system.console import say

CHECKS = 10  # within the bound
SILENT_CHECKS = 3  # without a message, after which a rank counts as silent


class Heard(NamedTuple):
    """The last message of a rank: its number, when it arrived, and the rank's pulse."""

    number: int
    at: float
    pulse: heartbeat.Pulse


def _exit(code: int) -> None:
    code = exit_codes.leave(code)
    siblings.end_silent(code)
    os._exit(code)


class Watchdog:
    """A thread that watches this process's pulse: `with Watchdog(bound_seconds):`. A bound of None watches nothing.

    It can start before the ranks have joined: then `start` is called first, and until the block is entered it only ends a run one
    of whose ranks is silent, because the parts of a start may take their time. end: called with the exit code. It ends the
    process, because nothing else stops a main thread that hangs.
    """

    def __init__(
        self, bound_seconds: float | None, *, end: Callable[[int], Any] = _exit, store: Any = None
    ) -> None:
        self._bound, self._end, self._store = bound_seconds, end, store
        self._trains, self._began = False, time.monotonic()
        self._every = min(5.0, (bound_seconds or 0) / CHECKS)
        self._stop = threading.Event()
        self._heard: dict[int, Heard] = {}
        self._num_sent, self._answered = 0, time.monotonic()
        # Two threads, because the store itself hangs when the network is cut.
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watchdog-{work.__name__}")
            for work in (self._watch, self._exchange)
        ]

    def start(self, store: Any = None) -> None:
        """Start the threads, if they do not run yet. store: the launcher's; None for that of the process group."""
        if self._bound is None or self._threads[0].is_alive():
            return
        heartbeat.beat("starting")
        self._began = time.monotonic()
        self._store = self._store or store or _store()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        self._stop.set()

    def __enter__(self) -> "Watchdog":
        heartbeat.beat("starting")
        self.start()
        self._trains = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        assert self._bound is not None
        while not self._stop.wait(self._every):
            now = time.monotonic()
            heard = [self._heard[rank].at if rank in self._heard else self._began for rank in self._others()]
            silence = now - min(heard, default=now)
            if (now - heartbeat.read().since if self._trains else silence) > self._bound:
                say(f"vaescale train: rank {_rank()}: {self._sentence()}")
                self._end(TrainingStopped.exit_code)
                return

    def _others(self) -> list[int]:
        return [rank for rank in range(_world_size()) if rank != _rank()]

    def _exchange(self) -> None:
        """Publish this rank's pulse, and read the other ranks' pulses."""
        while self._store is not None:
            try:
                step, activity, since, waits = heartbeat.read()
                self._num_sent += 1
                message = [self._num_sent, step, activity, time.monotonic() - since, waits]
                self._store.set(f"pulse/{_rank()}", json.dumps(message))
                for rank in self._others():
                    if self._store.check([f"pulse/{rank}"]):
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
        heard = {_rank(): Heard(0, now, pulse)} | dict(self._heard)
        newest = max(message.pulse.step for message in heard.values())
        missing = [rank for rank in range(_world_size()) if rank not in heard]
        assert self._bound is not None
        silence = SILENT_CHECKS * self._every + 1
        silence = silence if self._trains else min(silence, self._bound)
        silent = [rank for rank, message in heard.items() if now - message.at > silence]
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
        else:
            siblings.give_up([*missing, *silent])
        return (
            f"no sign of life for {self._bound:.0f} s (training.watchdog_seconds): {'; '.join(phrases)}; this rank is at step "
            f"{pulse.step} in {pulse.activity}; the same command continues from the last checkpoint"
        )


def _rank() -> int:
    """This process's rank, also before it has joined the others."""
    return comm.rank() or int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return max(comm.world_size(), int(os.environ.get("WORLD_SIZE", "1")))


def _store() -> Any:
    """A separate connection to the launcher's store, because that of the collectives may be waiting."""
    if comm.world_size() == 1:
        return None
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    return distributed_c10d.PrefixStore("vaescale", store.clone())
