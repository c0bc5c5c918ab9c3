"""Categorical decoder over the levels of each value, 256 at most. Van den Oord, Kalchbrenner & Kavukcuoglu 2016 (PixelRNN).

    log p(x|z) = sum log softmax(params)[level]                                          nats

Legend: L levels; params [B, C L, H, W]. For 8 bits the decoder returns 256 values per pixel value, which takes much memory for large
images.
"""

import torch
from einops import rearrange
from torch import Tensor

from vaescale import noise
from vaescale.likelihoods.base import Mass, levels_of, total
from vaescale.likelihoods.sigma import wide


class Categorical(Mass):
    """A categorical mass over levels 0 to L - 1, where level v means x = v / (L - 1)."""

    def num_params(self, channels: int) -> int:
        """Channels for L logits of each value."""
        return channels * self.num_levels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds multiples of 1/(L - 1)."""
        logits = self._by_level(params)
        chosen = logits.gather(2, levels_of(x, self.num_levels)[:, :, None]).squeeze(2)
        return total(chosen - torch.logsumexp(logits, dim=2))

    def mean(self, params: Tensor) -> Tensor:
        """The expected level divided by L - 1, [B, C, H, W]."""
        probabilities = torch.softmax(self._by_level(params), dim=2)
        values = torch.linspace(0, 1, self.num_levels, device=params.device, dtype=probabilities.dtype)
        return torch.einsum("bclhw,l->bchw", probabilities, values)

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw by the inverse distribution function; returns multiples of 1/(L - 1)."""
        edges = torch.softmax(self._by_level(params), dim=2).double().cumsum(2)
        u = noise.uniform(stream, noise.DECODER, (edges.shape[1], *edges.shape[3:])).double() + 2.0**-25
        level = (edges[:, :, :-1] < (u * edges[:, :, -1])[:, :, None]).sum(2)
        return level.to(wide(params).dtype) / (self.num_levels - 1)

    def _by_level(self, params: Tensor) -> Tensor:
        """Reshape [B, C L, H, W] to [B, C, L, H, W], float32 or wider."""
        return rearrange(wide(params), "b (c l) h w -> b c l h w", l=self.num_levels)
