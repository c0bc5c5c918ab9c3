"""How fast training runs and what it waits for."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from vaescale.system import heartbeat

T = TypeVar("T")


class Clock:
    """Throughput of the steps since the last look."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new interval: what came before was not training."""
        self._start = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time spent waiting for them measured."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            heartbeat.beat("reading data")
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            self._steps += 1
            yield batch

    def metrics(self, global_batch: int) -> dict[str, float]:
        """Throughput over all processes, seconds per step, the share spent waiting for data, peak memory here."""
        seconds, steps, waited = time.perf_counter() - self._start, max(1, self._steps), self._waited
        self.restart()
        return {
            "perf/images_per_second": global_batch * steps / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/data_wait_fraction": waited / seconds,
            "perf/memory_bytes": float(peak_memory_bytes()),
        }


def peak_memory_bytes() -> int:
    """This process's peak: device memory on a GPU, resident memory (Linux) otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
