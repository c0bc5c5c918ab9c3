"""A clock of training: throughput, time spent waiting for data, and peak memory."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from vaescale.system import heartbeat

T = TypeVar("T")


class Clock:
    """Throughput of the steps since the last call of `metrics`."""

    def __init__(self, full_speed: float | None = None) -> None:
        """full_speed: images a second at the full rate of all devices, for the utilization; None where it is unknown."""
        self._full_speed = full_speed
        self.restart()

    def restart(self) -> None:
        """Start a new interval, so that evaluations and checkpoints do not count as training time."""
        self._start = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and measure the time spent waiting for them."""
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
        """Throughput over all processes, seconds per step, fraction spent waiting for data, this process's peak memory, and the
        model FLOPs utilization where the devices' rate is known.
        """
        seconds, steps, waited = time.perf_counter() - self._start, max(1, self._steps), self._waited
        self.restart()
        speed = global_batch * steps / seconds
        share = {"perf/model_flops_utilization": speed / self._full_speed} if self._full_speed else {}
        return {
            **share,
            "perf/images_per_second": speed,
            "perf/step_seconds": seconds / steps,
            "perf/data_wait_fraction": waited / seconds,
            "perf/memory_bytes": float(peak_memory_bytes()),
        }


def peak_memory_bytes() -> int:
    """This process's peak: device memory on a GPU, resident memory (Linux) otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
