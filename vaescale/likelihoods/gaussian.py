"""Gaussian decoder with a global noise level: fixed, or the maximum-likelihood one (sigma-VAE).

Rybkin, Daniilidis & Levine 2021, "Simple and effective VAE training with calibrated decoders", eq. 5 and 6:

    log p(x|z) = -D (log sigma + log(2 pi) / 2) - |x - mean(z)|^2 / (2 sigma^2)       nats, D = C*H*W
    sigma*^2   = sum |x - mean(z)|^2 / (images * D)                                   over the whole global batch
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vaescale import comm, noise
from vaescale.config import Config

Positive = Annotated[float, Field(gt=0)]


class GaussianConfig(Config):
    """Gaussian pixels around a decoded mean in (0, 1)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: Positive | Literal["optimal"] = Field(
        default="optimal",
        description="a fixed noise level, or `optimal`: maximum likelihood over the global batch",
    )
    sigma_floor: float = Field(default=1e-4, gt=0, description="optimal sigma never goes below it")
    horizon_steps: float = Field(default=100, ge=1, description="averaging horizon of the running sigma")


class Gaussian(nn.Module):
    """log N(x; mean, sigma^2 I). With `optimal`, training uses the global batch's sigma, evaluation the running one.

    The training sigma is a constant for the gradient. That changes nothing: sigma is the argmax, so the gradient
    through it is zero. It also makes the mean of the ranks' gradients equal to the single-process gradient.

    The global batch is all of an optimizer step's images on all ranks; with gradient accumulation each micro-batch of
    it takes its own sigma in the loss, and the running one pools them all.

    `running` float64 [2] holds exponential averages of (sum of squared errors, number of values). Their ratio needs
    no bias correction, since both start at zero with the same weights. It is a buffer and equal on all ranks.
    """

    running: Tensor

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))
        self._collected: Tensor | None = None

    def num_params(self, channels: int) -> int:
        """The decoder returns the mean alone."""
        return channels

    def mean(self, params: Tensor) -> Tensor:
        """Decoded mean in (0, 1), float32 [B, C, H, W]."""
        return torch.sigmoid(params.float())

    def log_prob(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """Nats [B], summed over pixels. x [B, C, H, W] in [0, 1]; mask [B] keeps padding out of sigma."""
        squared_error = (x - self.mean(params)).square().flatten(1).sum(1)
        log_sigma = self._log_sigma(squared_error, mask, x[0].numel()).to(squared_error)
        constant = x[0].numel() * (log_sigma + 0.5 * math.log(2 * math.pi))
        return -constant - 0.5 * squared_error * torch.exp(-2 * log_sigma)

    def sample(self, params: Tensor, stream: noise.Stream) -> Tensor:
        """Ancestral sample [B, C, H, W]: the mean plus sigma times noise, not clipped to [0, 1]."""
        mean = self.mean(params)
        return mean + self.sigma.to(mean) * noise.normal(stream, noise.DECODER, tuple(mean.shape[1:]))

    def end_step(self) -> None:
        """Fold the squared errors of all micro-batches of this optimizer step into the running average."""
        collected, self._collected = self._collected, None
        if collected is None:
            return
        weight = 1 / self.config.horizon_steps
        finite = torch.isfinite(collected).all()
        self.running.copy_(torch.where(finite, self.running.lerp(collected, weight), self.running))

    @property
    def sigma(self) -> Tensor:
        """The fixed or running sigma, float64 []. 1 before the first training step."""
        if self.config.sigma != "optimal":
            return torch.full_like(self.running[0], self.config.sigma)
        return torch.where(self.running[1] > 0, self._maximum_likelihood(self.running), 1.0)

    def _log_sigma(self, squared_error: Tensor, mask: Tensor, dimensions: int) -> Tensor:
        if self.config.sigma != "optimal" or not self.training:
            return self.sigma.log()
        errors = torch.where(mask, squared_error, 0.0).double().sum()
        total = comm.all_reduce_sum(torch.stack([errors, mask.sum() * float(dimensions)]))
        self._collected = total if self._collected is None else self._collected + total
        return self._maximum_likelihood(total).log()

    def _maximum_likelihood(self, sums: Tensor) -> Tensor:
        # A hard floor leaves every sigma above it untouched. The reference code's soft clip
        # (-6 + softplus(log_sigma + 6)) inflates sigma by 1.8% at log sigma = -2 and by 13.5% at -4.
        return (sums[0] / sums[1]).sqrt().clamp_min(self.config.sigma_floor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gaussian":
        # `.bfloat16()` and `.half()`, which sharding backends call on whole models, must not touch the state.
        state = self.running
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.running = state.to(self.running.device)
        return self
