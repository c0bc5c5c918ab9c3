"""Finite scalar quantization: each channel is bounded by tanh and rounded to a few levels. Mentzer et al. 2024 (FSQ), section 3.

    level = round((L - 1) (tanh(e) + 1) / 2),    z = 2 level / (L - 1) - 1               for each channel, with L levels

The levels are evenly spaced in [-1, 1] for even L too, where the paper's are not symmetric around 0. The gradient of the rounding
is 1. There is no codebook, no term of the loss and no state. The code of a place has the first channel's level as its lowest digit.
"""

import math

import torch
from torch import Tensor

from vaescale.models.config import FiniteScalarConfig
from vaescale.models.quantizer import Quantized, Quantizer, straight_through


class FiniteScalar(Quantizer):
    """Rounding of raw [B, Z, h, w] to the levels of each channel."""

    levels: Tensor
    digits: Tensor

    def __init__(self, config: FiniteScalarConfig, latents: int) -> None:
        super().__init__(config, latents)
        self.num_codes = math.prod(config.levels)
        self.channel_nats = tuple(math.log(levels) for levels in config.levels)
        digits = [math.prod(config.levels[:channel]) for channel in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)
        self.register_buffer("digits", torch.tensor(digits), persistent=False)

    def forward(self, raw: Tensor) -> Quantized:
        """Round raw to levels."""
        most = (self.levels - 1).view(1, -1, 1, 1).to(raw)
        bounded = torch.tanh(raw)
        level = ((bounded.detach() + 1) / 2 * most).round()
        codes = (level.long() * self.digits.view(1, -1, 1, 1)).sum(1)
        z = straight_through(bounded, 2 * level / most - 1)
        return Quantized(raw, z, codes, raw.new_zeros(len(raw), 0))

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The levels of codes [B, h, w], [B, Z, h, w] in [-1, 1]."""
        shape = (1, -1, 1, 1)
        level = codes[:, None] // self.digits.view(shape) % self.levels.view(shape)
        return 2 * level.float() / (self.levels - 1).view(shape).float() - 1
