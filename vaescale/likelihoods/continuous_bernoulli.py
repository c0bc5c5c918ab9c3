"""Continuous Bernoulli decoder: the cross-entropy with grey targets, made a density. Loaiza-Ganem & Cunningham 2019.

p(x|z) = exp(t x) / integral over [0, 1] of exp(t u) du = exp(t x) t / (exp(t) - 1),     t the logit of lambda
log p(x|z) = sum (t x - log((exp(t) - 1) / t))                                           nats
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vaescale import noise
from vaescale.config import Config
from vaescale.likelihoods.base import Likelihood, dequantized, total, wide

SMALL = 0.1  # below it a series in t^2 has more digits than the closed forms


class ContinuousBernoulliConfig(Config):
    """Values in [0, 1], denser at the end that the logit points to."""

    kind: Literal["continuous_bernoulli"] = "continuous_bernoulli"
    dequantize: bool = Field(
        default=False,
        description="add uniform noise of one level, (255 x + u) / 256, so that bits_per_dim bounds a code length",
    )


class ContinuousBernoulli(Likelihood):
    """log CB(x; t), t = params."""

    config: ContinuousBernoulliConfig

    def target(self, x: Tensor, stream: noise.Stream) -> Tensor:
        """x, dequantized if the recipe says so."""
        return dequantized(x, stream) if self.config.dequantize else x

    def num_params(self, channels: int) -> int:
        """One logit a value."""
        return channels

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """Nats [B]."""
        t = wide(params)
        return total(x * t - log_normalizer(t))

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] = 1 / (1 - exp(-t)) - 1/t, which is not lambda."""
        return mean(wide(params))

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """By the inverse distribution function, in [0, 1]."""
        t = wide(params)
        u = noise.uniform(stream, noise.DECODER, tuple(t.shape[1:])).to(t)
        # log(1 + u (exp(t) - 1)) / t, for -|t| so that exp does not overflow, then mirrored.
        a = torch.where(t.abs() < 1e-4, 1.0, -t.abs())
        x = torch.where(t.abs() < 1e-4, u, torch.log1p(u * torch.expm1(a)) / a)
        return torch.where(t > 0, 1 - x, x).clamp(0, 1)


def log_normalizer(t: Tensor) -> Tensor:
    """log((exp(t) - 1) / t) = t/2 + log(sinh(t/2) / (t/2)), even around t/2: elementwise, exact at 0."""
    half = (t / 2).abs()
    safe = half.clamp_min(SMALL)  # both branches of `where` must have finite gradients
    large = safe + torch.log1p(-torch.exp(-2 * safe)) - torch.log(2 * safe)
    square = half.clamp_max(SMALL).square()
    small = square / 6 - square.square() / 180 + square.square() * square / 2835
    return t / 2 + torch.where(half < SMALL, small, large)


def mean(t: Tensor) -> Tensor:
    """The derivative of the log normalizer: 1/2 + (coth(t/2) - 2/t) / 2, elementwise."""
    half = t / 2
    safe = torch.where(half.abs() < SMALL, SMALL, half)
    large = 1 / torch.tanh(safe) - 1 / safe
    square = half.clamp(-SMALL, SMALL).square()
    small = half * (1 / 3 - square / 45 + 2 * square.square() / 945)
    return 0.5 + 0.5 * torch.where(half.abs() < SMALL, small, large)
