"""Continuous Bernoulli decoder: the cross-entropy with grey targets, normalized to a density. Loaiza-Ganem & Cunningham 2019.

    p(x|z) = exp(t x) / integral over [0, 1] of exp(t u) du = exp(t x) t / (exp(t) - 1),     t the logit of lambda
    log p(x|z) = sum (log|t| - log(1 - exp(-|t|)) - |t| d)                                   nats

where d is the distance of x from 0 for t < 0, or from 1 for t > 0. No term is large where the density is large, so black
backgrounds, which drive t to -infinity, lose no precision.
"""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.likelihoods.base import Density, total
from vaescale.likelihoods.config import ContinuousBernoulliConfig
from vaescale.likelihoods.sigma import wide

SMALL = 0.2  # below it a series in t^2 is more precise than the closed forms


class ContinuousBernoulli(Density):
    """The continuous Bernoulli likelihood: log CB(x; t), t = params."""

    config: ContinuousBernoulliConfig

    def num_params(self, channels: int) -> int:
        """Channels for one logit of each value."""
        return channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """The log density in nats, [B]."""
        return total(log_density(x, wide(params)))

    def mean(self, params: Tensor) -> Tensor:
        """The mean E[x|z] = 1 / (1 - exp(-t)) - 1/t, which is not lambda."""
        return mean(wide(params))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Draw in [0, 1] by the inverse distribution function."""
        t = wide(params)
        u = noise.uniform(stream, noise.DECODER, tuple(t.shape[1:])).to(t)
        # log(1 + u (exp(t) - 1)) / t, for -|t| so that exp does not overflow, then mirrored.
        a = torch.where(t.abs() < 1e-4, 1.0, -t.abs())
        x = torch.where(t.abs() < 1e-4, u, torch.log1p(u * torch.expm1(a)) / a)
        return torch.where(t > 0, 1 - x, x).clamp(0, 1)


def log_density(x: Tensor, t: Tensor) -> Tensor:
    """The log density log p(x) in nats, elementwise."""
    size = t.abs().clamp_min(SMALL)  # both branches of `where` must have finite gradients
    from_end = torch.where(t > 0, 1 - x, x)
    large = torch.log(size) - torch.log1p(-torch.exp(-size)) - size * from_end
    # log(sinh(t/2) / (t/2)) = t^2/24 - t^4/2880 + t^6/181440 - ...
    square = t.clamp(-SMALL, SMALL).square()
    small = t * (x - 0.5) - square / 24 + square.square() / 2880 - square.square() * square / 181440
    return torch.where(t.abs() < SMALL, small, large)


def mean(t: Tensor) -> Tensor:
    """The mean E[x] = 1/2 + (coth(t/2) - 2/t) / 2, elementwise."""
    half = t / 2
    safe = torch.where(t.abs() < SMALL, SMALL, half)
    large = 1 / torch.tanh(safe) - 1 / safe
    square = half.clamp(-SMALL / 2, SMALL / 2).square()
    small = half * (1 / 3 - square / 45 + 2 * square.square() / 945)
    return 0.5 + 0.5 * torch.where(t.abs() < SMALL, small, large)
