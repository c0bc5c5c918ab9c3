"""Discretized logistic decoder and its mixture with channel autoregression: masses over the L levels.

    P(v|z) = F((v - m + 1/(L - 1)) / s) - F((v - m - 1/(L - 1)) / s),   v = 2x - 1, F the logistic function

where the first level includes everything below it and the last level everything above it. Kingma et al. 2016
(one logistic); Salimans, Karpathy, Chen & Kingma 2017 (mixture): the components of a pixel are shared by its
channels, and a channel's mean moves with the channels before it.

Legend: K components; L levels, 256 for 8 bits; v, m, s on [-1, 1], where a level is 2/(L - 1) wide.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vaescale import noise
from vaescale.likelihoods.base import Mass, total
from vaescale.likelihoods.config import (
    SCALE_CEILING,
    DiscretizedLogisticConfig,
    DiscretizedLogisticMixtureConfig,
)
from vaescale.likelihoods.level_means import chained_means, level_mean
from vaescale.likelihoods.sigma import floored, wide

SCALE_FLOOR = 255 / 2 * math.exp(-7)  # an eighth of a level, in levels
INITIAL_SCALE = 0.25


class DiscretizedLogistic(Mass):
    """A discretized logistic. The decoder returns the mean, and the raw log scale if it is predicted."""

    config: DiscretizedLogisticConfig

    def __init__(self, config: DiscretizedLogisticConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape)
        if config.scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(image_shape[0]))

    def num_params(self, channels: int) -> int:
        """Channels for the mean, and for the raw log scale if it is predicted."""
        return 2 * channels if self.config.scale == "predicted" else channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds multiples of 1/(L - 1)."""
        mean, log_scale = self._split(params)
        return total(log_level_mass(2 * x - 1, mean, log_scale, self.num_levels))

    def mean(self, params: Tensor) -> Tensor:
        """The mean E[x|z] over the levels, within 1e-4."""
        mean, log_scale = self._split(params)
        return (level_mean(mean, torch.exp(log_scale), self.num_levels) + 1) / 2

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A logistic draw, clipped and rounded to its level: multiples of 1/(L - 1)."""
        mean, log_scale = self._split(params)
        u = noise.uniform(stream, noise.DECODER, tuple(mean.shape[1:])).to(mean) + 2.0**-25
        return _to_level(mean + torch.exp(log_scale) * torch.logit(u), self.num_levels)

    def mean_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """The mean [B, C, H, W] and log scale on [-1, 1], which broadcasts to it, float32 or wider."""
        return self._split(params)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        params = wide(params)
        if self.config.scale == "predicted":
            mean, raw = params.chunk(2, dim=1)
            return mean, _log_scale(raw, self.num_levels)
        if self.config.scale == "shared":
            return params, _log_scale(wide(self.raw_scale).view(1, -1, 1, 1), self.num_levels)
        return params, torch.full_like(params[:1], math.log(self.config.scale))


class Components(NamedTuple):
    """The components of a mixture: log weights [B, K, H, W]; means and log scales [B, K, C, H, W]; coefficients [B, K, C (C-1)/2, H, W]."""

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor


class DiscretizedLogisticMixture(Mass):
    """A mixture of discretized logistics, with K (1 + 2 C + C (C-1)/2) channels.

    These are weights, means, log scales, and coefficients between channels.
    """

    config: DiscretizedLogisticMixtureConfig

    def num_params(self, channels: int) -> int:
        """The number of channels: 100 for ten components of three channels, as in the paper."""
        return self.config.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log mass in nats [B]. x holds multiples of 1/(L - 1)."""
        v = 2 * x - 1
        parts = self._split(params)
        means = torch.stack(
            [self.mean_of_channel(parts, c, v[:, None].unbind(2)) for c in range(v.shape[1])], dim=2
        )
        log_mass = log_level_mass(v[:, None], means, parts.log_scales, self.num_levels).sum(2)
        return total(torch.logsumexp(parts.log_weights + log_mass, dim=1))

    def mean(self, params: Tensor) -> Tensor:
        """The mean E[x|z] over the levels of every channel, in each component through its coefficients between channels.

        Within 1e-4 for one channel, 0.003 for more: see `level_means`.
        """
        parts = self._split(params)
        batch, components, channels, height, width = parts.means.shape
        rows = (
            rearrange(part, "b k n h w -> (b k h w) n")
            for part in (parts.means, parts.log_scales, parts.coefficients)
        )
        means = chained_means(*rows, levels=self.num_levels).view(batch, components, height, width, channels)
        weighted = torch.einsum("bkhw,bkhwc->bchw", parts.log_weights.exp(), means)
        return ((weighted + 1) / 2).clamp(0, 1)  # the weights' sum has rounding errors

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw a component for each pixel, then channel by channel; returns multiples of 1/(L - 1)."""
        return self.draw(params, *self.uniform(stream))

    def uniform(self, stream: noise.Stream) -> tuple[Tensor, Tensor]:
        """The uniform numbers of `draw` for images of the whole shape: [B, H, W], which choose components, and [B, C, H, W]."""
        of_components = noise.uniform(stream, noise.DECODER, self.image_shape[1:])
        return of_components, noise.uniform(stream, noise.DECODER + 1, self.image_shape)

    def draw(self, params: Tensor, of_components: Tensor, of_levels: Tensor) -> Tensor:
        """A draw [B, C, H, W] as a function of uniform numbers in [0, 1), those of `uniform`; H and W may be other than the images'."""
        parts = self._split(params)
        edges = parts.log_weights.exp().double().cumsum(1)
        u = of_components.double() + 2.0**-25
        component = (edges[:, :-1] < (u * edges[:, -1])[:, None]).sum(1, keepdim=True)
        drawn: list[Tensor] = []
        u = of_levels.to(parts.means) + 2.0**-25
        for c in range(self.image_shape[0]):
            mean = self.mean_of_channel(parts, c, drawn).gather(1, component)
            scale = parts.log_scales[:, :, c].gather(1, component).exp()
            drawn.append(2 * _to_level(mean + scale * torch.logit(u[:, c, None]), self.num_levels) - 1)
        return (torch.cat(drawn, dim=1) + 1) / 2

    def components(self, params: Tensor) -> Components:
        """The components that params describe, float32 or wider; the means are those before channels move them."""
        return self._split(params)

    def _split(self, params: Tensor) -> Components:
        channels = self.image_shape[0]
        pairs = channels * (channels - 1) // 2
        parts = rearrange(wide(params), "b (k n) h w -> b k n h w", k=self.config.components)
        logits, means, raw, coefficients = torch.split(parts, [1, channels, channels, pairs], dim=2)
        log_weights = torch.log_softmax(logits.squeeze(2), dim=1)
        log_scales = _log_scale(
            raw, self.num_levels, first=self.config.first_scale, ceiling=self.config.scale_ceiling
        )
        return Components(log_weights, means, log_scales, torch.tanh(coefficients))

    def mean_of_channel(
        self, parts: Components, channel: int, earlier: "tuple[Tensor, ...] | list[Tensor]"
    ) -> Tensor:
        """The mean of channel c [B, K, H, W], shifted by the channels before it, [B, K or 1, H, W] each (eq. 3)."""
        first = channel * (channel - 1) // 2
        mean = parts.means[:, :, channel]
        for number in range(channel):
            mean = mean + parts.coefficients[:, :, first + number] * earlier[number]
        return mean


def log_level_mass(v: Tensor, mean: Tensor, log_scale: Tensor, levels: int = 256) -> Tensor:
    """The log mass of a level in nats, elementwise; v on [-1, 1].

    With a and b the standardized upper and lower edge, F(a) - F(b) = F(a) F(-b) (1 - exp(b - a)): exact and without
    cancellation for any scale and distance, so no approximation is needed. Distances are in levels, where v is a whole number: on
    [-1, 1] a rounding error of float32 is a level's 1/500 for 16 bits, and neighbours would not share an edge.
    """
    half = (levels - 1) / 2  # levels in a unit of v
    number = ((v + 1) * half).round()
    distance = number - (mean + 1) * half
    inverse_scale = torch.exp(-log_scale) / half
    upper = (distance + 0.5) * inverse_scale
    lower = (distance - 0.5) * inverse_scale
    is_first, is_last = number < 0.5, number > levels - 1.5
    below = torch.where(is_last, 0.0, logsigmoid(upper))
    above = torch.where(is_first, 0.0, logsigmoid(-lower))
    return below + above + torch.where(is_first | is_last, 0.0, torch.log(-torch.expm1(-inverse_scale)))


def _log_scale(
    raw: Tensor, levels: int, *, first: float = INITIAL_SCALE, ceiling: float | None = SCALE_CEILING
) -> Tensor:
    log_scale = floored(math.log(first) + raw, SCALE_FLOOR * 2 / (levels - 1))
    return log_scale if ceiling is None else -floored(-log_scale, 1 / ceiling)


def _to_level(v: Tensor, levels: int) -> Tensor:
    """Round values on [-1, 1] or beyond to the nearest level, in [0, 1]."""
    return ((v.clamp(-1, 1) + 1) / 2 * (levels - 1)).round() / (levels - 1)
