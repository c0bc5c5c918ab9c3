"""Numbers on a device that the host reads one step later, because it would wait for the device to read them at once."""

import torch
from torch import Tensor


class Later:
    """Vectors of `width` numbers, one per step, which the device copies to the host while it computes the next step.

    Two vectors are held: an unread one is overwritten by the second vector after it.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._slots = [torch.zeros(width, dtype=torch.float64, pin_memory=self._on_gpu) for _ in range(2)]
        events = 2 if self._on_gpu else 0
        self._events = [torch.cuda.Event() for _ in range(events)]  # type: ignore[no-untyped-call]
        self._steps = [0, 0]
        self._written = self._read = 0

    def put(self, step: int, values: Tensor) -> None:
        """Start to copy the numbers of a step, float64 [width], to the host."""
        slot = self._written % 2
        self._slots[slot].copy_(values, non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()
        self._steps[slot] = step
        self._written += 1

    def take(self, *, newest: bool) -> list[tuple[int, list[float]]]:
        """The steps and numbers that were not taken yet, oldest first. newest: include the last vector, and wait for it."""
        end = self._written if newest else self._written - 1
        unread = range(max(self._read, self._written - 2), end)
        self._read = max(self._read, end)
        return [self._value(number % 2) for number in unread]

    def clear(self) -> None:
        """Drop the vectors that were not taken yet."""
        self._read = self._written

    def _value(self, slot: int) -> tuple[int, list[float]]:
        if self._on_gpu:
            self._events[slot].synchronize()
        values: list[float] = self._slots[slot].tolist()
        return self._steps[slot], values
