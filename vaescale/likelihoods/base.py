"""The contract of every p(x|z), and the base classes of the continuous families.

Images are x [B, C, H, W] in [0, 1]; integers of L levels are multiples of 1/(L - 1), with L = 256 for 8 bits. Continuous families are
densities on that scale, discrete families are masses over the L levels (Bernoulli: over black and white).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.config import Window
from vaescale.likelihoods.config import (
    DensityConfig,
    LikelihoodConfig,
    LocationScaleConfig,
    MeanConfig,
)
from vaescale.likelihoods.sigma import SigmaState, wide


class Likelihood(nn.Module):
    """The contract of a likelihood, with defaults for most families. Override `num_params`, `log_prob`, `mean` and `sample`."""

    reads_x: bool = False
    """Whether log_prob fits a parameter to each single x, so it gives no bound for unseen images."""

    def __init__(self, config: LikelihoodConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        self.image_shape = image_shape
        self.dimensions = image_shape[0] * image_shape[1] * image_shape[2]

    @property
    def measure(self) -> Literal["density", "mass"]:
        """Whether p(x|z) is a density on [0, 1] or a mass over levels."""
        return self.config.measure

    @property
    def window(self) -> Window:
        """The stored values of the images that are 0 and 1."""
        return self.config.window

    @property
    def levels(self) -> int | None:
        """The number L of values that a pixel has; None for real numbers, which have a density only."""
        return self.config.levels

    @property
    def added_bits(self) -> float | None:
        """What bits per dimension add to nats / (D ln 2): log2 L for a density on [0, 1], 0 for a mass; None without levels.

        Each of L levels has a cell of width 1/L. Theis, van den Oord & Bethge 2016, section 3.1.
        """
        return 0.0 if self.measure == "mass" else self.window.bits

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:  # noqa: ARG002
        """The images that the model encodes and reconstructs: x binarized, dequantized, or unchanged."""
        return x

    def expected_target(self, x: Tensor) -> Tensor:
        """The mean of `target` over its noise."""
        return x

    def num_params(self, channels: int) -> int:
        """The number of channels that the decoder must return for each pixel."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """log p(x|z) in nats [B], summed over pixels. x [B, C, H, W]; params [B, num_params(C), H, W]; mask [B], false for padding.

        In training mode it may call one collective, and it collects the sums for the sigma state.
        """
        raise NotImplementedError

    def transformed_log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """log p(x|z) in nats [B] of transformed images of any size, in training, after `log_prob` of the images themselves.

        Sigma is that of `log_prob`, as a constant, and its state collects nothing.
        """
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """The mean E[x|z], [B, C, H, W]."""
        raise NotImplementedError

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A draw of x [B, C, H, W], a function of only the stream's seed, step and slots."""
        raise NotImplementedError

    def variance(self, params: Tensor) -> Tensor | None:  # noqa: ARG002
        """Var[x|z], broadcastable to [B, C, H, W], if it depends on z.

        None when `sigma` describes the noise, or for a family without a meaningful variance.
        """
        return None

    def deviation(self, params: Tensor) -> Tensor | None:
        """The standard deviation of p(x|z), broadcastable to [B, C, H, W]; None for families without a meaningful one."""
        variance = self.variance(params)
        if variance is not None:
            return variance.sqrt()
        return None if self.sigma is None else self.sigma.view(1, 1, 1, 1)

    def noise_map(self, params: Tensor) -> tuple[str, Tensor] | None:
        """The noise level of each value [B, C, H, W] with its name; None where all values have one level, or none is meaningful."""
        deviation = self.deviation(params)
        if deviation is None or deviation.numel() == 1:
            return None
        return "sigma", deviation.expand(len(params), *self.image_shape)

    def central_mass(self, x: Tensor, params: Tensor) -> Tensor | None:  # noqa: ARG002
        """P(|X - mean| <= |x - mean|) under p(x|z) for each value, [B, C, H, W]; None for families without noise around a mean."""
        return None

    def end_step(self) -> None:
        """Add the sums of log_prob to the sigma state; called once per optimizer step, on every rank."""

    @property
    def sigma(self) -> Tensor | None:
        """The standard deviation of the noise that evaluation uses, float64 []; None when it depends on z or does not exist."""
        return None

    @property
    def progress(self) -> dict[str, Tensor]:
        """Further values of the sigma state that are logged as curves, [] each."""
        return {}


class Density(Likelihood):
    """The base class of a continuous family."""

    config: DensityConfig

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:
        """Return x, or with `dequantize` ((L - 1) x + u) / L with u uniform in [0, 1).

        The expected log density at such points is a lower bound of the log mass of the level, log of the integral over
        its cell of width 1/L (Theis, van den Oord & Bethge 2016, section 3.1).
        """
        if not self.config.dequantize:
            return x
        u = noise.uniform(stream, noise.DEQUANTIZE, tuple(x.shape[1:]))
        levels = _known(self.levels)
        return ((levels - 1) * x + u.to(x)) / levels

    def expected_target(self, x: Tensor) -> Tensor:
        """Return x, or with `dequantize` ((L - 1) x + 1/2) / L."""
        if not self.config.dequantize:
            return x
        levels = _known(self.levels)
        return ((levels - 1) * x + 0.5) / levels


class LocationScale(Density):
    """The base class of values around a decoded mean, with sigma from `vaescale.likelihoods.sigma`. Override `log_prob` and `sample`.

    The decoder returns the mean, and with `sigma: predicted` also a raw log sigma.
    """

    config: LocationScaleConfig

    def __init__(
        self, config: LocationScaleConfig, *, image_shape: tuple[int, int, int], power: int, factor: float
    ) -> None:
        super().__init__(config, image_shape=image_shape)
        self.reads_x = config.sigma == "optimal_per_image"
        self.state = SigmaState(config, image_shape=image_shape, power=power, factor=factor)

    def num_params(self, channels: int) -> int:
        """Channels for the mean, and for log sigma if it is predicted."""
        return 2 * channels if self.state.predicts else channels

    def mean(self, params: Tensor) -> Tensor:
        """The decoded mean [B, C, H, W]."""
        return self.mean_and_raw(params)[0]

    def variance(self, params: Tensor) -> Tensor | None:
        """The variance sigma^2 [B, C, H, W] if sigma is predicted, else None."""
        if not self.state.predicts:
            return None
        return torch.exp(2 * self.state.evaluation_log_sigma(self.mean_and_raw(params)[1]))

    def deviation(self, params: Tensor) -> Tensor | None:
        """The standard deviation, with one value for each pixel or channel if sigma has several."""
        if self.sigma is None:
            return super().deviation(params)
        return torch.exp(self.state.evaluation_log_sigma(None))

    def transformed_log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """`log_prob` with the sigma of its last call. A predicted sigma is that of these params."""
        with self.state.held():
            return self.log_prob(x, params, mask)

    def end_step(self) -> None:
        """Update the running sigma."""
        self.state.end_step()

    @property
    def sigma(self) -> Tensor | None:
        """The root mean square of sigma, float64 []; None if predicted."""
        return self.state.sigma

    @property
    def progress(self) -> dict[str, Tensor]:
        """The progress `handover`: 0 in stage one, 1 in stage two."""
        weight = self.state.handed_over
        return {} if weight is None else {"handover": weight}

    def mean_and_raw(self, params: Tensor) -> tuple[Tensor, Tensor | None]:
        """The decoded mean, and the raw log sigma if it is predicted, [B, C, H, W] each, float32 or wider."""
        params = wide(params)
        mean, raw = params.chunk(2, dim=1) if self.state.predicts else (params, None)
        return decoded_mean(mean, self.config), raw


def decoded_mean(params: Tensor, config: MeanConfig) -> Tensor:
    """The mean from the decoder's output, float32 or wider."""
    return torch.sigmoid(wide(params)) if config.mean == "sigmoid" else wide(params)


class Mass(Likelihood):
    """The base class of a family over the L levels of integers."""

    @property
    def num_levels(self) -> int:
        """The number L of levels."""
        return _known(self.levels)


def levels_of(x: Tensor, levels: int) -> Tensor:
    """The level of each value, int64: (levels - 1) x, rounded."""
    return (x * (levels - 1)).round().long()


def _known(levels: int | None) -> int:
    assert levels is not None, "recipes with real numbers and levels are refused"
    return levels


def total(per_value: Tensor) -> Tensor:
    """[B, ...] to [B]: the sum over all values of an image."""
    return per_value.flatten(1).sum(1)
