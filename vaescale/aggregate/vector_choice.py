"""The vector of each sample of a model that is given vectors: one that was asked for, or those of the held-out images in turn."""

from typing import NamedTuple

from torch import Tensor

from vaescale import noise


class VectorChoice(NamedTuple):
    """How samples get their vectors. rows: float32 [M, V], of which sample i takes row i modulo M; NaN is none. text: in words, for titles."""

    rows: Tensor
    text: str

    def of(self, stream: noise.Stream) -> Tensor:
        """The vector of each slot, float32 [B, V]: a function of the slot."""
        return self.rows.to(stream.slots.device)[stream.slots % len(self.rows)]
