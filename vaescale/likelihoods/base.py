"""What every p(x|z) offers, and the recipe keys that several of them share.

Images come as x [B, C, H, W] in [0, 1]; 8-bit images as multiples of 1/255. Continuous families are densities on that
scale, discrete ones masses over the 256 levels (Bernoulli: over black and white).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.likelihoods.config import (
    LEVELS,
    DensityConfig,
    LikelihoodConfig,
    LocationScaleConfig,
    MeanConfig,
)
from vaescale.likelihoods.sigma import SigmaState, wide


class Likelihood(nn.Module):
    """The contract, with what most families have in common. Override `num_params`, `log_prob`, `mean` and `sample`."""

    reads_x: bool = False
    """Whether log_prob fits a parameter to each single x, so that it does not bound the evidence of unseen images."""

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
    def levels(self) -> int:
        """The number of values that a pixel has under a mass."""
        return self.config.levels

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:  # noqa: ARG002
        """The images that are encoded and modelled in place of x: binarized, dequantized, or x itself."""
        return x

    def num_params(self, channels: int) -> int:
        """Channels that the decoder must return for each pixel."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """Nats [B], summed over pixels. x [B, C, H, W]; params [B, num_params(C), H, W]; mask [B], false for padding.

        In training mode it may call one collective, and collects what the sigma state needs.
        """
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] [B, C, H, W]."""
        raise NotImplementedError

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """A draw of x [B, C, H, W], a function of the stream's seed, step and slots alone."""
        raise NotImplementedError

    def variance(self, params: Tensor) -> Tensor | None:  # noqa: ARG002
        """Var[x|z], broadcastable to [B, C, H, W], where it depends on z; None when `sigma` describes the noise, or where a variance has little meaning."""
        return None

    def deviation(self, params: Tensor) -> Tensor | None:
        """The standard deviation of p(x|z), broadcastable to [B, C, H, W]; None for families without a meaningful one."""
        variance = self.variance(params)
        if variance is not None:
            return variance.sqrt()
        return None if self.sigma is None else self.sigma.view(1, 1, 1, 1)

    def central_mass(self, x: Tensor, params: Tensor) -> Tensor | None:  # noqa: ARG002
        """P(|X - mean| <= |x - mean|) under p(x|z) for each value, [B, C, H, W]; None for families that are not noise around a mean."""
        return None

    def end_step(self) -> None:
        """Fold what log_prob collected into the sigma state; once per optimizer step, on every rank."""

    @property
    def sigma(self) -> Tensor | None:
        """The standard deviation of the noise that evaluation uses, float64 []; None when it depends on z or does not exist."""
        return None

    @property
    def progress(self) -> dict[str, Tensor]:
        """Further numbers of the sigma state that are logged as curves, [] each."""
        return {}


class Density(Likelihood):
    """A continuous family."""

    config: DensityConfig

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:
        """x, or with `dequantize` (255 x + u) / 256 with u uniform in [0, 1).

        The expected log density at such points is a lower bound of the log mass of the level, log of the integral over
        its cell of width 1/256 (Theis, van den Oord & Bethge 2016, section 3.1).
        """
        if not self.config.dequantize:
            return x
        u = noise.uniform(stream, noise.DEQUANTIZE, tuple(x.shape[1:]))
        return (255 * x + u.to(x)) / 256


class LocationScale(Density):
    """Values around a decoded mean with sigma from `vaescale.likelihoods.sigma`. Override `log_prob` and `sample`.

    The decoder returns the mean, and with `sigma: predicted` a raw log sigma beside it.
    """

    config: LocationScaleConfig

    def __init__(
        self, config: LocationScaleConfig, *, image_shape: tuple[int, int, int], power: int, factor: float
    ) -> None:
        super().__init__(config, image_shape=image_shape)
        self.reads_x = config.sigma == "optimal_per_image"
        self.state = SigmaState(config, image_shape=image_shape, power=power, factor=factor)

    def num_params(self, channels: int) -> int:
        """The mean, and log sigma if it is predicted."""
        return 2 * channels if self.state.predicts else channels

    def mean(self, params: Tensor) -> Tensor:
        """The decoded mean [B, C, H, W]."""
        return self.mean_and_raw(params)[0]

    def variance(self, params: Tensor) -> Tensor | None:
        """sigma^2 [B, C, H, W] if it is predicted."""
        if not self.state.predicts:
            return None
        return torch.exp(2 * self.state.evaluation_log_sigma(self.mean_and_raw(params)[1]))

    def deviation(self, params: Tensor) -> Tensor | None:
        """One value for each pixel or channel where sigma has one."""
        if self.sigma is None:
            return super().deviation(params)
        return torch.exp(self.state.evaluation_log_sigma(None))

    def end_step(self) -> None:
        """Update the running sigma."""
        self.state.end_step()

    @property
    def sigma(self) -> Tensor | None:
        """Root mean square sigma, float64 []; None if predicted."""
        return self.state.sigma

    @property
    def progress(self) -> dict[str, Tensor]:
        """`handover`: 0 in stage one, 1 in stage two."""
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


def levels(x: Tensor) -> Tensor:
    """The 8-bit level of each value, int64: 255 x, rounded."""
    return (x * (LEVELS - 1)).round().long()


def total(per_value: Tensor) -> Tensor:
    """[B, ...] to [B]: the sum over all values of an image."""
    return per_value.flatten(1).sum(1)
