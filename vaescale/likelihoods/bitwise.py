"""Bitwise categorical decoder: each of a value's 8 bits is a Bernoulli. Rybkin, Daniilidis & Levine 2021.

    log p(x|z) = sum over values and bits of (bit logit - log(1 + exp(logit)))           nats

Legend: params [B, C 8, H, W], the highest bit first. The decoder returns 8 values per pixel value instead of the categorical's 256.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import softplus

from vaescale import noise
from vaescale.likelihoods.base import Likelihood, levels, total
from vaescale.likelihoods.config import LEVELS
from vaescale.likelihoods.sigma import wide

BITS = 8


class Bitwise(Likelihood):
    """A mass over levels 0 to 255 by bits, where level v means x = v / 255."""

    def num_params(self, channels: int) -> int:
        """Channels for eight logits of each value."""
        return channels * BITS

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds multiples of 1/255."""
        logits = _by_bit(params)
        bits = levels(x)[:, :, None] >> _shifts(params) & 1
        return total(bits * logits - softplus(logits))

    def mean(self, params: Tensor) -> Tensor:
        """The expected level divided by 255, [B, C, H, W]."""
        return _to_unit(torch.sigmoid(_by_bit(params)))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw each bit independently; returns multiples of 1/255."""
        probabilities = torch.sigmoid(_by_bit(params))
        u = noise.uniform(stream, noise.DECODER, tuple(probabilities.shape[1:]))
        return _to_unit((u < probabilities).to(probabilities))


def _by_bit(params: Tensor) -> Tensor:
    """Reshape [B, C 8, H, W] to [B, C, 8, H, W], float32 or wider."""
    return rearrange(wide(params), "b (c n) h w -> b c n h w", n=BITS)


def _shifts(params: Tensor) -> Tensor:
    return torch.arange(BITS - 1, -1, -1, device=params.device).view(1, 1, BITS, 1, 1)


def _to_unit(bits: Tensor) -> Tensor:
    """Combine bits [B, C, 8, H, W] to the level divided by 255, [B, C, H, W]."""
    return (bits * (1 << _shifts(bits))).sum(2) / (LEVELS - 1)
