"""Student-t decoder: heavy tails, robust where a predicted Gaussian sigma collapses. Takahashi et al. 2018.

    log p(x|z) = sum (lgamma((v + 1) / 2) - lgamma(v / 2) - log(v pi) / 2 - log s - (v + 1) / 2 log(1 + e^2 / v)),
    e = (x - mean(z)) / s                                                                nats

s is the scale, not the standard deviation, which is s sqrt(v / (v - 2)). Learned degrees of freedom v stay above 2, so
that the standard deviation exists.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vaescale import noise
from vaescale.likelihoods.base import Density, decoded_mean, total
from vaescale.likelihoods.config import StudentTConfig
from vaescale.likelihoods.sigma import floored, wide

INITIAL_EXCESS = 8.0
NEARLY_NORMAL = 1e6  # half of the degrees above which the log-gammas cancel in float64 too
FAR = 60.0  # -2/v log u above which 1 is nothing beside its exponential, and float32 does not overflow yet


class StudentT(Density):
    """The Student-t likelihood: log t_v(x; mean, s). The decoder returns the mean, then raw log scale and raw degrees if they are predicted."""

    config: StudentTConfig

    def __init__(self, config: StudentTConfig, *, image_shape: tuple[int, int, int]) -> None:
        super().__init__(config, image_shape=image_shape)
        if config.scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(1))
        if config.degrees_of_freedom == "shared":
            self.raw_degrees = nn.Parameter(torch.zeros(1))

    def num_params(self, channels: int) -> int:
        """Channels for the mean, and for the predicted scale and degrees."""
        return channels * (1 + [self.config.scale, self.config.degrees_of_freedom].count("predicted"))

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log density in nats, [B]."""
        mean, log_scale, v = self._split(params)
        normalizer = _log_normalizer(v.double() / 2)
        squared = ((x - mean) * torch.exp(-log_scale)).square()
        return total(normalizer.to(log_scale) - log_scale - (v + 1) / 2 * torch.log1p(squared / v))

    def mean(self, params: Tensor) -> Tensor:
        """The decoded location [B, C, H, W]: the mean where v > 1, the median always."""
        return self._split(params)[0]

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw by Bailey 1994, "Polar generation of random variates with the t-distribution"; not clipped to [0, 1].

        With few degrees of freedom many draws are beyond the dtype's range (0.01: two of five are beyond 1e38), and become its
        largest finite value.
        """
        mean, log_scale, v = self._split(params)
        shape = tuple(mean.shape[1:])
        u = noise.uniform(stream, noise.DECODER, shape).to(mean) + 2.0**-25
        angle = 2 * math.pi * noise.uniform(stream, noise.DECODER + 1, shape).to(mean)
        direction = torch.cos(angle)
        exponent = -2 / v * torch.log(u)
        near = torch.exp(log_scale) * (torch.sqrt(v * torch.expm1(exponent.clamp_max(FAR))) * direction)
        logarithm = log_scale + 0.5 * (torch.log(v) + exponent) + torch.log(direction.abs())
        far = torch.sign(direction) * torch.exp(logarithm)
        largest = torch.finfo(mean.dtype).max
        return (mean + torch.where(exponent < FAR, near, far)).clamp(-largest, largest)

    def central_mass(self, x: Tensor, params: Tensor) -> Tensor | None:
        """The central mass 2 T_v(|e|) - 1, with T_v the distribution function."""
        from scipy.special import stdtr

        mean, log_scale, v = self._split(params)
        deviation = ((x - mean).abs() * torch.exp(-log_scale)).double()
        below = stdtr(v.double().expand_as(deviation).cpu().numpy(), deviation.cpu().numpy())
        return torch.from_numpy(2 * below - 1).to(x)

    def variance(self, params: Tensor) -> Tensor | None:
        """The variance s^2 v / (v - 2), broadcastable to [B, C, H, W]; None with fixed degrees of 2 or fewer."""
        _, log_scale, v = self._split(params)
        fixed = self.config.degrees_of_freedom
        if not isinstance(fixed, str) and fixed <= 2:
            return None
        return torch.exp(2 * log_scale) * v / (v - 2)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log scale, degrees of freedom, broadcastable to [B, C, H, W]."""
        parts = list(wide(params).chunk(self.num_params(1), dim=1))
        mean = decoded_mean(parts.pop(0), self.config)
        config = self.config
        if isinstance(config.scale, str):
            raw = parts.pop(0) if config.scale == "predicted" else wide(self.raw_scale).view(1, 1, 1, 1)
            log_scale = floored(math.log(config.initial_scale) + raw, config.scale_floor)
        else:
            log_scale = torch.full_like(mean[:1], math.log(config.scale))
        if isinstance(config.degrees_of_freedom, str):
            predicted = config.degrees_of_freedom == "predicted"
            raw = parts.pop(0) if predicted else wide(self.raw_degrees).view(1, 1, 1, 1)
            degrees = 2.01 + softplus(raw + INITIAL_EXCESS)
        else:
            degrees = torch.full_like(mean[:1], config.degrees_of_freedom)
        return mean, log_scale, degrees


def _log_normalizer(half: Tensor) -> Tensor:
    """log gamma(h + 1/2) - log gamma(h) - log(2 pi h) / 2 of half the degrees of freedom h, float64.

    The log-gammas cancel: at v = 1e4 float32 is off by 2.5 nats a 28x28 image, at v = 1e12 float64 by 2e-4 nats a value. The
    difference is (log h) / 2 - 1 / (8 h) + 1 / (192 h^3) - ... DLMF 5.11.13.
    """
    some, many = half.clamp_max(NEARLY_NORMAL), half.clamp_min(NEARLY_NORMAL)
    exact = torch.lgamma(some + 0.5) - torch.lgamma(some) - 0.5 * torch.log(2 * math.pi * some)
    series = -0.5 * math.log(2 * math.pi) - 1 / (8 * many)
    return torch.where(half < NEARLY_NORMAL, exact, series)
