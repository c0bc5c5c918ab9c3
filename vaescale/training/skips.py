"""Unusable images: counted by reason over all ranks, reported once each, and too many of them stop a run."""

from collections.abc import Iterable, Iterator

import torch

from vaescale import comm
from vaescale.data.batch import Batch, Fault
from vaescale.data.pictures import REASONS
from vaescale.errors import DataError
from vaescale.system.console import say

MOST_REPORTED = 20


class Skips:
    """Counts of unusable images since this start.

    most: the fraction that may be unusable, of the images read or of one epoch, whichever is more.
    """

    def __init__(self, *, epoch_images: int, most: float, device: torch.device) -> None:
        self._epoch_images, self._most = epoch_images, most
        self._counts = torch.zeros(len(REASONS) + 1, dtype=torch.float64)
        self._device = device
        self._reported: set[int] = set()

    def counting(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield the same steps, and count and report their unusable images."""
        for batches in steps:
            for batch in batches:
                self._counts[-1] += len(batch.slots)
                for fault in batch.faults:
                    self._counts[REASONS.index(fault.reason)] += 1
                tell(batch.faults, self._reported)
            yield batches

    def metrics(self) -> dict[str, float]:
        """The metrics `data/skipped/REASON` over all ranks, for the reasons that occurred. All ranks call it.

        Raises DataError on all ranks when more images were unusable than the recipe allows.
        """
        *counts, read = comm.all_reduce_sum(self._counts.to(self._device)).tolist()
        skipped, allowed = sum(counts), self._most * max(read, self._epoch_images)
        if skipped > allowed:
            named = ", ".join(
                f"{count:.0f} {reason}" for reason, count in zip(REASONS, counts, strict=True) if count
            )
            raise DataError(
                f"{skipped:.0f} of {read:.0f} images could not be used ({named}), data.max_skipped (={self._most}) "
                f"allows {allowed:.0f}; `vaescale verify-shards DIR --deep` names them all"
            )
        return {
            f"data/skipped/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count
        }


def tell(faults: Iterable[Fault], reported: set[int]) -> None:
    """Report each fault once. reported: numbers of the samples that were reported; updated."""
    for fault in faults:
        if fault.number not in reported and len(reported) < MOST_REPORTED:
            reported.add(fault.number)
            more = "; further ones are only counted" if len(reported) == MOST_REPORTED else ""
            say(f"skipped ({fault.reason}): {fault.words}{more}")
