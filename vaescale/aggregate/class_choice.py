"""The class of each sample: the one that was asked for, or one drawn from the frequencies of the training images."""

from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.runs.class_table import ClassTable


class ClassChoice(NamedTuple):
    """How samples get their classes. chosen: a class, NONE, or None for p(y)."""

    table: ClassTable
    chosen: int | None = None

    def of(self, stream: noise.Stream) -> Tensor:
        """The class of each slot, int64 [B]: a function of (seed, step, slot)."""
        slots = stream.slots
        if self.chosen is not None:
            return torch.full_like(slots, self.chosen)
        edges = torch.tensor(self.table.frequencies, dtype=torch.float64, device=slots.device).cumsum(0)
        uniform = noise.uniform(stream, noise.CONDITION, ()).double() * edges[-1]
        return torch.searchsorted(edges, uniform, right=True).clamp_max(len(edges) - 1)

    @property
    def text(self) -> str:
        """The choice in words, for titles."""
        if self.chosen is None:
            return "classes by their frequencies"
        return "no class" if self.chosen < 0 else f"class {self.table.names[self.chosen]}"
