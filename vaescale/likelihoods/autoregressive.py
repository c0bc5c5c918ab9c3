"""A mixture of discretized logistics at each pixel, given z and the pixels before it that are near: a local autoregressive decoder.

    p(x|z) = product over pixels i of p(x_i | z, the pixels before i within the radius),      raster order

The decoder returns features of each pixel. A small network, equal at every pixel, maps them and the values of the pixels before it to
the mixture's parameters. As in lossless codecs, what it sees and what it returns may be relative to a prediction: the mean of the pixel to
the left and the one above. Gulrajani et al. 2017 (PixelVAE); Chen et al. 2017: since a pixel sees only its neighbourhood, z has what is
global, and loses what neighbours tell already. The mass and its gradient take one pass over all pixels; draws and means go through the
pixels in waves: all pixels of a wave (`waves`) depend on earlier waves alone.

Legend: r the radius; V = 2 r (r + 1) pixels before a pixel; F features; P pixels; N parameters of a mixture; v = 2 x - 1.
"""

import math
from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu, unfold

from vaescale import noise
from vaescale.likelihoods.base import Mass
from vaescale.likelihoods.config import AutoregressiveLogisticMixtureConfig
from vaescale.likelihoods.discretized_logistic import DiscretizedLogisticMixture
from vaescale.likelihoods.level_means import level_mean
from vaescale.likelihoods.sigma import wide

UNIT = 1 / 32  # on [-1, 1]: of differences from the prediction, four of 256 levels


class AutoregressiveLogisticMixture(Mass):
    """Discretized logistics given z and near pixels before. The decoder returns F features of each pixel."""

    config: AutoregressiveLogisticMixtureConfig

    def __init__(
        self, config: AutoregressiveLogisticMixtureConfig, *, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__(config, image_shape=image_shape)
        self.mixture = DiscretizedLogisticMixture(config, image_shape=image_shape)
        self.network = PixelNetwork(
            (image_shape[0] + 1) * pixels_before(config.radius) + image_shape[0],
            config.width,
            config.blocks,
            self.mixture.num_params(image_shape[0]),
        )
        order, self.wave_sizes = waves(*image_shape[1:], config.radius)
        self.register_buffer("order", order, persistent=False)  # [P], int64
        self.order: Tensor

    def num_params(self, channels: int) -> int:  # noqa: ARG002
        """The number F of features."""
        return self.config.width

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """The log mass in nats [B]. x holds multiples of 1/(L - 1)."""
        return self.mixture.log_prob(x, self.mixture_params(x, params), mask)

    def mixture_params(self, x: Tensor, params: Tensor) -> Tensor:
        """The parameters [B, N, H, W] of the mixtures of known images, float32 or wider."""
        radius, (height, width) = self.config.radius, x.shape[2:]
        window = (radius + 1, 2 * radius + 1)
        seen = unfold(self._framed(x), window).view(len(x), x.shape[1] + 1, -1, height * width)
        before = seen[:, :, : pixels_before(radius)].transpose(2, 3)
        made = self._mixture_of(before, wide(params).flatten(2).transpose(1, 2))
        return made.reshape(len(x), -1, height, width)

    def mean(self, params: Tensor) -> Tensor:
        """In place of E[x|z], which would need all images: the mean of each value given the means of those before it, [B, C, H, W]."""
        return self._one_after_the_other(params, lambda mixture, _: self.pixel_mean(mixture))

    def pixel_mean(self, mixture: Tensor) -> Tensor:
        """The weighted means [B, C, H, W] of the components, in each of which a channel moves with the means of those before it."""
        parts = self.mixture.components(mixture)
        means = list[Tensor]()
        for channel in range(self.image_shape[0]):
            centre = self.mixture.mean_of_channel(parts, channel, means)
            means.append(level_mean(centre, parts.log_scales[:, :, channel].exp(), self.num_levels))
        weighted = (parts.log_weights.exp()[:, :, None] * torch.stack(means, dim=2)).sum(1)
        return ((weighted + 1) / 2).clamp(0, 1)

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A draw, pixel after pixel: multiples of 1/(L - 1)."""
        uniform = self.mixture.uniform(stream)

        def draw(mixture: Tensor, places: Tensor) -> Tensor:
            at_places = (one.flatten(-2)[..., None, places] for one in uniform)
            return self.mixture.draw(mixture, *at_places)

        return self._one_after_the_other(params, draw)

    def params_by_wave(self, params: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Go through the waves of images that are not known yet. Yields the places [P'] of a wave as y W + x, the parameters [B, N, 1, P'] of
        their mixtures and values [B, C, P'], in which the caller writes the pixels, in [0, 1], before it goes on.
        """
        radius, (height, width) = self.config.radius, params.shape[2:]
        channels = self.image_shape[0]
        features = wide(params).flatten(2).transpose(1, 2)  # [B, P, F]
        empty = features.new_zeros(len(params), channels, height, width)
        framed = self._framed(empty)
        framed_width, inside = framed.shape[-1], framed.flatten(2)
        window = torch.arange(pixels_before(radius), device=params.device)
        offsets = window // (2 * radius + 1) * framed_width + window % (2 * radius + 1)
        for places in torch.split(self.order, self.wave_sizes):
            corners = places // width * framed_width + places % width  # of each pixel's window
            before = inside[:, :, corners[:, None] + offsets]  # [B, C + 1, P', V]
            made = self._mixture_of(before, features[:, places])
            values = features.new_empty(len(params), channels, len(places))
            yield places, made[:, :, None], values
            inside[:, :channels, corners + radius * framed_width + radius] = 2 * values - 1

    def _one_after_the_other(self, params: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Images [B, C, H, W] whose pixels `choose` returns, [B, C, 1, P'], from parameters [B, N, 1, P'] and places [P']."""
        images = wide(params).new_empty(len(params), self.image_shape[0], math.prod(params.shape[2:]))
        for places, mixture, values in self.params_by_wave(params):
            values.copy_(choose(mixture, places)[:, :, 0])
            images[:, :, places] = values
        return images.view(len(params), -1, *params.shape[2:])

    def _mixture_of(self, before: Tensor, features: Tensor) -> Tensor:
        """The parameters [B, N, P] of pixels' mixtures. before: v of the pixels before and a channel that is 1 within the image, [B, C + 1, P, V];
        features: [B, P, F].
        """
        channels, radius = self.image_shape[0], self.config.radius
        v, within = before[:, :channels], before[:, channels:]
        prediction, unit = v.new_zeros(v.shape[:3]), 1.0  # [B, C, P]
        if self.config.relative:
            near = [before.shape[-1] - 1, (radius - 1) * (2 * radius + 1) + radius]  # to the left, and above
            prediction = v[..., near].sum(-1) / within[..., near].sum(-1).clamp_min(1)
            unit = UNIT
        difference = (v - prediction[..., None]) * (within / unit)
        rows = torch.cat([difference, within], dim=1).transpose(1, 2).flatten(2)
        made: Tensor = self.network(torch.cat([rows, prediction.transpose(1, 2)], dim=2), features)
        parts = rearrange(made, "b p (k n) -> b k n p", k=self.config.components)
        pairs = channels * (channels - 1) // 2
        logits, means, scales, coefficients = torch.split(parts, [1, channels, channels, pairs], dim=2)
        means = prediction[:, None] + unit * means
        # A channel moves with the differences of those before it from their predictions.
        moved = list(means.unbind(2))
        for channel in range(channels):
            for earlier in range(channel):
                coefficient = torch.tanh(coefficients[:, :, channel * (channel - 1) // 2 + earlier])
                moved[channel] = moved[channel] - coefficient * prediction[:, None, earlier]
        return torch.cat([logits, torch.stack(moved, dim=2), scales, coefficients], dim=2).flatten(1, 2)

    def _framed(self, x: Tensor) -> Tensor:
        """v of images with a channel of ones, and a frame of zeros that the windows reach into, [B, C + 1, H + r, W + 2 r]."""
        radius = self.config.radius
        values = torch.cat([2 * wide(x) - 1, torch.ones_like(wide(x)[:, :1])], dim=1)
        return pad(values, (radius, radius, radius, 0))


class PixelNetwork(nn.Module):
    """The network of one pixel: a residual network of the pixels before it and its features."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = _weights(width, inputs), _weights(outputs, width)
        self.inner = nn.Parameter(torch.stack([_weights(width, width) for _ in range(2 * blocks)]).detach())
        self.first_bias = nn.Parameter(torch.zeros(width))
        self.last_bias = nn.Parameter(torch.zeros(outputs))
        self.inner_bias = nn.Parameter(torch.zeros(2 * blocks, width))

    def forward(self, before: Tensor, features: Tensor) -> Tensor:
        """before: [B, P, (C + 1) V + C]; features: [B, P, F]. Returns [B, P, N] in their precision."""
        with torch.autocast(before.device.type, enabled=False):  # what it returns are parameters of masses
            y = features + self._layer(before, self.first, self.first_bias)
            for number in range(0, len(self.inner), 2):
                inside = self._layer(silu(y), self.inner[number], self.inner_bias[number])
                y = y + self._layer(silu(inside), self.inner[number + 1], self.inner_bias[number + 1])
            return self._layer(silu(y), self.last, self.last_bias)

    @staticmethod
    def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _weights(outputs: int, inputs: int) -> nn.Parameter:
    weights = torch.empty(outputs, inputs)
    nn.init.kaiming_uniform_(weights, a=math.sqrt(5))
    return nn.Parameter(weights)


def pixels_before(radius: int) -> int:
    """The number V of pixels before a pixel that are at most `radius` rows and columns away."""
    return 2 * radius * (radius + 1)


def waves(height: int, width: int, radius: int) -> tuple[Tensor, list[int]]:
    """The places y W + x in an order in which each comes after all that it depends on, [P], and the numbers of places that may be
    computed at once: those with equal x + (r + 1) y, since a pixel reaches r to the right in the row above it.
    """
    number = torch.arange(height * width)
    wave = number % width + (radius + 1) * (number // width)
    order = torch.argsort(wave, stable=True)
    sizes = torch.bincount(wave)
    return order, sizes[sizes > 0].tolist()
