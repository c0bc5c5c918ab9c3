"""The codes of pixels under each likelihood, from its parameters on the grid of `rounding.py`.

Legend: B images, C channels, L levels, K components, D = C H W values, M = B H W places. Levels are int64 [B, C, H, W].
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from vaescale.compression.arithmetic import Reals, exponential, logistic
from vaescale.compression.masses import (
    Code,
    Integers,
    Symbols,
    Table,
    by_digits,
    digits,
    digits_of,
    from_digits,
    looked_up,
    symbols_received,
    table,
    values_received,
)
from vaescale.compression.rounding import Phases, on_grid
from vaescale.errors import UserError
from vaescale.likelihoods.autoregressive import AutoregressiveLogisticMixture
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.bernoulli import Bernoulli
from vaescale.likelihoods.bitwise import Bitwise
from vaescale.likelihoods.categorical import Categorical
from vaescale.likelihoods.discretized_logistic import DiscretizedLogistic, DiscretizedLogisticMixture

LEVELS, BITS = 256, 8
WHITE = 255
HALF_LEVEL = 1 / (LEVELS - 1)
COLUMNS = 2048  # places at once
LARGEST = 2.0**10  # of a parameter: beyond it all masses are 0 or 1
Shape = tuple[int, int, int]


class PixelCode(ABC):
    """How the pixels of one likelihood are coded. Images are of `shape` (C, H, W) and have `levels` levels.

    `features` of the decoder's output are the parameters, unless these depend on pixels, too: see `AutoregressiveCode`.
    """

    levels = LEVELS

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood, self.shape = likelihood, likelihood.image_shape

    @abstractmethod
    def parameters(self, params: Tensor) -> Tensor:
        """The numbers that the masses are made of, float64 [B, P, H, W], from the decoder's output in float64."""

    def features(self, params: Tensor) -> Tensor:
        """What is kept of the decoder's output in float64 until the pixels are coded."""
        return self.parameters(params)

    def known(self, features: Tensor, levels: Integers) -> Tensor:  # noqa: ARG002
        """The parameters of known images [B, P, H, W], not on the grid yet. features: [B, ...], as `features` returned them."""
        return features

    def decoding(self, features: Tensor, phases: Phases) -> Code:
        """The code of unknown images."""
        yield from self.code(_rounded(features, phases))

    @abstractmethod
    def code(self, parameters: Reals) -> Code:
        """The code of images with parameters [B, P, H, W] on the grid."""

    @abstractmethod
    def symbols(self, levels: Integers) -> list[Symbols]:
        """The symbols of images, round by round."""

    @abstractmethod
    def levels_of(self, symbols: list[Symbols]) -> Integers:
        """The images of symbols."""


class BinaryCode(PixelCode):
    """Black and white: one symbol a value."""

    levels = 2

    def parameters(self, params: Tensor) -> Tensor:
        """The logit of white."""
        return params.clamp(-LARGEST, LARGEST)

    def code(self, parameters: Reals) -> Code:
        """One round of all values."""
        yield binary_table(parameters)

    def symbols(self, levels: Integers) -> list[Symbols]:
        """0 for black, 1 for white."""
        return [levels.reshape(-1).astype(np.int32)]

    def levels_of(self, symbols: list[Symbols]) -> Integers:
        """The symbols themselves."""
        return symbols[0].astype(np.int64).reshape(-1, *self.shape)


class BitwiseCode(PixelCode):
    """Eight independent bits a value, in one round."""

    def parameters(self, params: Tensor) -> Tensor:
        """The logit of each bit, [B, C 8, H, W]."""
        return params.clamp(-LARGEST, LARGEST)

    def code(self, parameters: Reals) -> Code:
        """One round of all bits."""
        yield binary_table(parameters)

    def symbols(self, levels: Integers) -> list[Symbols]:
        """The bits, the highest first, as channels."""
        shifts = np.arange(BITS - 1, -1, -1)[:, None, None]
        return [(levels[:, :, None] >> shifts & 1).astype(np.int32).reshape(-1)]

    def levels_of(self, symbols: list[Symbols]) -> Integers:
        """The values of their bits."""
        channels, height, width = self.shape
        bits = symbols[0].astype(np.int64).reshape(-1, channels, BITS, height, width)
        values: Integers = (bits << np.arange(BITS - 1, -1, -1)[:, None, None]).sum(2)
        return values


class LevelCode(PixelCode):
    """The base of codes of levels by digits, channel by channel."""

    def symbols(self, levels: Integers) -> list[Symbols]:
        """The digits of the first channel at all places, then of the second, ..."""
        return [
            one
            for channel in range(self.shape[0])
            for one in digits_of(levels[:, channel].reshape(-1), LEVELS)
        ]

    def levels_of(self, symbols: list[Symbols]) -> Integers:
        """The levels of the digits."""
        channels, height, width = self.shape
        images = len(symbols[0]) // (height * width)
        return _levels_of(symbols, channels, images).reshape(images, *self.shape)


class CategoricalCode(LevelCode):
    """A mass for each level."""

    def parameters(self, params: Tensor) -> Tensor:
        """The logits less the largest of their value, [B, C L, H, W]."""
        logits = params.view(len(params), -1, LEVELS, *params.shape[2:])
        relative: Tensor = (logits - logits.amax(2, keepdim=True)).clamp_min(-60.0)
        return relative.flatten(1, 2)

    def code(self, parameters: Reals) -> Code:
        """The channels one after the other."""
        channels, height, width = self.shape
        logits = parameters.reshape(-1, channels, LEVELS, height * width)
        for channel in range(channels):
            masses = exponential(logits[:, channel].swapaxes(0, 1).reshape(LEVELS, -1))  # [L, M]
            below = np.zeros((LEVELS + 1, masses.shape[1]))
            for level in range(LEVELS):
                np.add(below[level], masses[level], out=below[level + 1])
            below /= below[-1].copy()
            yield from by_digits(looked_up(below), masses.shape[1], LEVELS)


class LogisticCode(LevelCode):
    """A discretized logistic for each value."""

    def parameters(self, params: Tensor) -> Tensor:
        """The means and log scales, [B, 2 C, H, W]."""
        mean, log_scale = self._logistic.mean_and_log_scale(params)
        return torch.cat([mean.clamp(-LARGEST, LARGEST), log_scale.expand_as(mean)], dim=1)

    @property
    def _logistic(self) -> DiscretizedLogistic:
        assert isinstance(self.likelihood, DiscretizedLogistic)
        return self.likelihood

    def code(self, parameters: Reals) -> Code:
        """The channels one after the other."""
        channels = self.shape[0]
        for channel in range(channels):
            mean, log_scale = (parameters[:, channel + shift].reshape(1, -1) for shift in (0, channels))
            mixture = _Mixture(np.ones_like(mean), mean, exponential(-log_scale))
            yield from by_digits(mixture.cdf, mean.shape[1], LEVELS)


class MixtureCode(LevelCode):
    """A mixture of discretized logistics, whose components and means move with the channels before."""

    def parameters(self, params: Tensor) -> Tensor:
        """Log weights, means, log scales and coefficients, [B, K (1 + 2 C + C (C-1)/2), H, W]."""
        parts = self._logistics.components(params)
        means, coefficients = parts.means.clamp(-LARGEST, LARGEST), parts.coefficients
        log_weights = parts.log_weights.clamp_min(-60.0)
        return torch.cat([log_weights[:, :, None], means, parts.log_scales, coefficients], dim=2).flatten(
            1, 2
        )

    @property
    def _logistics(self) -> DiscretizedLogisticMixture:
        assert isinstance(self.likelihood, DiscretizedLogisticMixture)
        return self.likelihood

    def code(self, parameters: Reals) -> Code:
        """The channels one after the other, each given the levels of those before."""
        channels, components = self.shape[0], self._logistics.config.components
        images, _, height, width = parameters.shape
        apart = parameters.reshape(images, components, -1, height * width).transpose(2, 1, 0, 3)
        parts = np.ascontiguousarray(apart).reshape(len(apart), components, -1)  # [1 + 2 C + ..., K, M]
        means, log_scales, coefficients = parts[1:], parts[1 + channels :], parts[1 + 2 * channels :]
        weights, earlier = exponential(parts[0]), list[Reals]()
        for channel in range(channels):
            mean, first = means[channel].copy(), channel * (channel - 1) // 2
            for number, values in enumerate(earlier):
                mean += coefficients[first + number] * values
            mixture = _Mixture(_shares(weights), mean, exponential(-log_scales[channel]))
            level = yield from values_received(by_digits(mixture.cdf, mean.shape[1], LEVELS))
            if channel + 1 < channels:
                weights = _shares(weights * mixture.component_masses(level))
                earlier.append(np.asarray(level * (2 * HALF_LEVEL) - 1.0, np.float64))


class AutoregressiveCode(MixtureCode):
    """A mixture of discretized logistics given the pixels before, coded wave after wave."""

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__(likelihood)
        assert isinstance(likelihood, AutoregressiveLogisticMixture)
        self._waves = [one.numpy() for one in torch.split(likelihood.order.cpu(), likelihood.wave_sizes)]

    @property
    def _autoregressive(self) -> AutoregressiveLogisticMixture:
        assert isinstance(self.likelihood, AutoregressiveLogisticMixture)
        return self.likelihood

    @property
    def _logistics(self) -> DiscretizedLogisticMixture:
        return self._autoregressive.mixture

    def features(self, params: Tensor) -> Tensor:
        """The features of the network at each pixel."""
        return params

    def known(self, features: Tensor, levels: Integers) -> Tensor:
        """The parameters of all pixels in one pass."""
        x = torch.from_numpy(levels) / (self.levels - 1.0)
        return self.parameters(self._autoregressive.mixture_params(x.to(features), features))

    def decoding(self, features: Tensor, phases: Phases) -> Code:
        """Wave after wave: the parameters of the next follow from the values of those before."""
        for _, mixture, values in self._autoregressive.params_by_wave(features):
            rounded = _rounded(self.parameters(mixture), phases)
            symbols = yield from symbols_received(super().code(rounded))
            levels = _levels_of(symbols, self.shape[0], images=len(features))
            values.copy_(torch.from_numpy(levels) / (self.levels - 1.0))

    def code(self, parameters: Reals) -> Code:
        """The waves of known images."""
        flat = parameters.reshape(*parameters.shape[:2], -1)
        for places in self._waves:
            yield from super().code(np.ascontiguousarray(flat[:, :, None, places]))

    def symbols(self, levels: Integers) -> list[Symbols]:
        """Those of each wave's pixels."""
        flat = levels.reshape(*levels.shape[:2], -1)
        return [
            one
            for places in self._waves
            for one in super(AutoregressiveCode, self).symbols(flat[:, :, None, places])
        ]

    def levels_of(self, symbols: list[Symbols]) -> Integers:
        """The levels of the waves' digits, each at its place."""
        channels, height, width = self.shape
        rounds = channels * digits(LEVELS)
        images = len(symbols[0]) // len(self._waves[0])
        levels = np.empty((images, channels, height * width), np.int64)
        for number, places in enumerate(self._waves):
            of_wave = symbols[rounds * number : rounds * (number + 1)]
            levels[:, :, places] = _levels_of(of_wave, channels, images)
        return levels.reshape(images, *self.shape)


def _levels_of(symbols: list[Symbols], channels: int, images: int) -> Integers:
    """The levels [B, C, places of an image] of digits, channel after channel."""
    count = digits(LEVELS)
    values = [from_digits(symbols[count * channel : count * (channel + 1)]) for channel in range(channels)]
    return np.stack([value.reshape(images, -1) for value in values], axis=1)


def _rounded(parameters: Tensor, phases: Phases) -> Reals:
    """The parameters [B, ...] on the grids of their images."""
    return on_grid(parameters.flatten(1).numpy(), phases).reshape(parameters.shape)


class _Mixture:
    """Logistics on [-1, 1] with weights, means and inverse scales [K, M] each."""

    def __init__(self, weights: Reals, means: Reals, inverse_scales: Reals) -> None:
        self._weights, self._means, self._inverse = weights, means, inverse_scales

    def cdf(self, edges: Integers) -> Reals:
        """The share [E, M] below edges [E, M]; edge n is the lower end of level n."""
        total = np.zeros(edges.shape)
        for first in range(
            0, edges.shape[1], COLUMNS
        ):  # so that all of a part's numbers stay in the processor's cache
            part = slice(first, first + COLUMNS)
            places = edges[:, part] * (2 * HALF_LEVEL) - (1 + HALF_LEVEL)
            for component in range(len(self._weights)):
                deviation = places - self._means[component, part]
                deviation *= self._inverse[component, part]
                share = logistic(deviation)
                share *= self._weights[component, part]
                total[:, part] += share
        return total

    def component_masses(self, levels: Integers) -> Reals:
        """The mass of levels [M] in each component, [K, M]: F(a) F(-b) (1 - exp(b - a)) between edges a above b."""
        lower = (levels * (2 * HALF_LEVEL) - (1 + HALF_LEVEL) - self._means) * self._inverse
        width = 2 * HALF_LEVEL * self._inverse
        below = np.where(levels == LEVELS - 1, 1.0, logistic(lower + width))
        above = np.where(levels == 0, 1.0, logistic(-lower))
        inside = (levels > 0) & (levels < LEVELS - 1)
        masses: Reals = below * above * np.where(inside, 1.0 - exponential(-width), 1.0)
        return masses


def pixel_code(likelihood: Likelihood) -> PixelCode:
    """The code of a likelihood. Raises UserError for one that is no mass over levels, or has none here."""
    for kind, implementation in CODES.items():
        if type(likelihood) is kind and likelihood.levels == implementation.levels:
            return implementation(likelihood)
    raise UserError(
        f"likelihood.kind (={likelihood.config.kind!r}, {likelihood.levels} levels) has no lossless code; choose a run with "
        "bernoulli, or with bitwise, categorical, discretized_logistic, discretized_logistic_mixture or autoregressive_logistic_mixture of 256 "
        "levels"
    )


CODES: dict[type[Likelihood], type[PixelCode]] = {
    Bernoulli: BinaryCode,
    Bitwise: BitwiseCode,
    Categorical: CategoricalCode,
    DiscretizedLogistic: LogisticCode,
    DiscretizedLogisticMixture: MixtureCode,
    AutoregressiveLogisticMixture: AutoregressiveCode,
}


def binary_table(logits: Reals) -> Table:
    """The table of independent bits with these logits, in the order of memory."""
    ones = logistic(logits.reshape(-1))
    return table([1.0 - ones, ones])


def _shares(weights: Reals) -> Reals:
    """Weights [K, M] divided by their sum; even where all are 0."""
    floored = weights + 2.0**-200
    total = floored[0].copy()
    for row in floored[1:]:
        total += row
    shares: Reals = floored / total
    return shares
