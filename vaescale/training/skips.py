"""Images that could not be used: counted by reason over all ranks, told once each, and a run stopped by too many."""

from collections.abc import Iterable, Iterator

import torch

from vaescale import comm
from vaescale.data.batch import Batch, Fault
from vaescale.data.pictures import REASONS
from vaescale.errors import DataError
from vaescale.system.console import say

TOLD = 20


class Skips:
    """Counts since this start. `most` is the fraction of the images read, of at least one epoch, that is borne."""

    def __init__(self, *, epoch_images: int, most: float, device: torch.device) -> None:
        self._epoch_images, self._most = epoch_images, most
        self._counts = torch.zeros(len(REASONS) + 1, dtype=torch.float64)
        self._device = device
        self._told: set[int] = set()

    def counting(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The same steps; what could not be used is counted, and told once."""
        for batches in steps:
            for batch in batches:
                self._counts[-1] += len(batch.slots)
                for fault in batch.faults:
                    self._counts[REASONS.index(fault.reason)] += 1
                tell(batch.faults, self._told)
            yield batches

    def metrics(self) -> dict[str, float]:
        """`data/skipped/REASON` over all ranks, of the reasons that occurred. All ranks call it.

        Raises DataError on all of them when more were skipped than the recipe bears.
        """
        *counts, read = comm.all_reduce_sum(self._counts.to(self._device)).tolist()
        skipped, borne = sum(counts), self._most * max(read, self._epoch_images)
        if skipped > borne:
            named = ", ".join(
                f"{count:.0f} {reason}" for reason, count in zip(REASONS, counts, strict=True) if count
            )
            raise DataError(
                f"{skipped:.0f} of {read:.0f} images could not be used ({named}), data.max_skipped (={self._most}) "
                f"bears {borne:.0f}; `vaescale verify-shards DIR --deep` names them all"
            )
        return {
            f"data/skipped/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count
        }


def tell(faults: Iterable[Fault], told: set[int]) -> None:
    """Say each fault once; `told` holds the samples that were told of."""
    for fault in faults:
        if fault.number not in told and len(told) < TOLD:
            told.add(fault.number)
            more = "; the next ones are counted only" if len(told) == TOLD else ""
            say(f"skipped ({fault.reason}): {fault.words}{more}")
