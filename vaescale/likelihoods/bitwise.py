"""Bitwise categorical decoder: each bit of a value is a Bernoulli. Rybkin, Daniilidis & Levine 2021.

    log p(x|z) = sum over values and bits of (bit logit - log(1 + exp(logit)))           nats

Legend: L levels, N = log2 L bits; params [B, C N, H, W], the highest bit first. For 8 bits the decoder returns 8 values per pixel value
instead of the categorical's 256.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import softplus

from vaescale import noise
from vaescale.likelihoods.base import Mass, levels_of, total
from vaescale.likelihoods.sigma import wide


class Bitwise(Mass):
    """A mass over levels 0 to L - 1 by bits, where level v means x = v / (L - 1)."""

    @property
    def bits(self) -> int:
        """The number N of bits of a value."""
        return (self.num_levels - 1).bit_length()

    def num_params(self, channels: int) -> int:
        """Channels for a logit of each bit."""
        return channels * self.bits

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds multiples of 1/(L - 1)."""
        logits = self._by_bit(params)
        bits = levels_of(x, self.num_levels)[:, :, None] >> self._shifts(params) & 1
        return total(bits * logits - softplus(logits))

    def mean(self, params: Tensor) -> Tensor:
        """The expected level divided by L - 1, [B, C, H, W]."""
        return self._to_unit(torch.sigmoid(self._by_bit(params)))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw each bit independently; returns multiples of 1/(L - 1)."""
        probabilities = torch.sigmoid(self._by_bit(params))
        u = noise.uniform(stream, noise.DECODER, tuple(probabilities.shape[1:]))
        return self._to_unit((u < probabilities).to(probabilities))

    def _by_bit(self, params: Tensor) -> Tensor:
        """Reshape [B, C N, H, W] to [B, C, N, H, W], float32 or wider."""
        return rearrange(wide(params), "b (c n) h w -> b c n h w", n=self.bits)

    def _shifts(self, params: Tensor) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=params.device).view(1, 1, self.bits, 1, 1)

    def _to_unit(self, bits: Tensor) -> Tensor:
        """Combine bits [B, C, N, H, W] to the level divided by L - 1, [B, C, H, W]."""
        return (bits * (1 << self._shifts(bits))).sum(2) / (self.num_levels - 1)
