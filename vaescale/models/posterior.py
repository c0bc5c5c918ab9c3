"""The approximate posterior q(z|x) from raw parameters, and the KL of Gaussians.

Legend: z of a latent vector is [B, Z], of a map [B, Z, H, W]; log sigma broadcasts over axes on which it does not depend.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vaescale.models import gaussians
from vaescale.models.config import DiagonalConfig, FixedConfig, PosteriorConfig

LOG_SIGMA_BOUND = 8.0


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean and log standard deviation, float32 or float64."""

    mu: Tensor
    log_sigma: Tensor

    def sample(self, epsilon: Tensor) -> Tensor:
        """Return the draw mu + sigma epsilon."""
        return self.mu + torch.exp(self.log_sigma) * epsilon

    def log_density(self, z: Tensor) -> Tensor:
        """The log density in nats, value by value."""
        standard = (z - self.mu) * torch.exp(-self.log_sigma)
        return -0.5 * (standard.square() + math.log(2 * math.pi)) - self.log_sigma


def kl(q: Gaussian, p: Gaussian | None = None) -> Tensor:
    """KL(q || p) in nats, value by value; p is the standard normal if None. Kingma & Welling 2014, appendix B."""
    if p is None:
        return 0.5 * (q.mu.square() + _excess(2 * q.log_sigma))
    deviation, ratio = (q.mu - p.mu) * torch.exp(-p.log_sigma), q.log_sigma - p.log_sigma
    return 0.5 * (deviation.square() + _excess(2 * ratio))


def _excess(log_square: Tensor) -> Tensor:
    """r - 1 - log r of the ratio r of two variances from log r, at least 0, in its dtype.

    Near r = 1 it is (log r)^2 / 2, which float32 loses in the difference of its terms: they are subtracted in float64.
    """
    wide = log_square.double()
    return torch.expm1(wide).sub(wide).to(log_square)


def draw(q: Gaussian, p: Gaussian | None, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """The draw `q.sample(epsilon)`, and `kl(q, p)` summed over the places of a map, [B, Z], in one node of the graph.

    Values and gradients are those of the two functions, of a compiled one but for rounding, with half of the operations and fewer maps kept for
    the backward pass.
    """
    if torch.compiler.is_compiling():  # fuses the plain form
        cost = kl(q, p)
        return q.sample(epsilon), cost.sum(tuple(range(2, cost.ndim))) if cost.ndim > 2 else cost
    prior: tuple[Tensor | None, Tensor | None] = (None, None) if p is None else (p.mu, p.log_sigma)
    if gaussians.take(*q, *prior, epsilon):
        return gaussians.draw(*q, *prior, epsilon)
    z, cost = _Draw.apply(*q, *prior, epsilon)  # type: ignore[no-untyped-call]
    return z, cost


def bounded(raw: Tensor) -> Tensor:
    """Bound raw log sigma smoothly to +-8, near the identity around 0: exp stays finite and the gradient never vanishes.

    On a CPU a map's bound and its draws below are compiled functions (`gaussians.py`).
    """
    if torch.compiler.is_compiling():
        return LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)
    if gaussians.take(raw):
        return gaussians.bounded(raw)
    log_sigma: Tensor = _Bounded.apply(raw)  # type: ignore[no-untyped-call]
    return log_sigma


class _Draw(torch.autograd.Function):
    """With d = (mu - mu_p) / sigma_p and r = sigma / sigma_p, KL = (d^2 + r^2 - 1) / 2 - log r, and its derivatives are

    mu  d / sigma_p        log sigma  r^2 - 1        mu_p  -d / sigma_p        log sigma_p  -(d^2 + r^2 - 1)
    """

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        log_sigma: Tensor,
        mu_p: Tensor | None,
        log_sigma_p: Tensor | None,
        epsilon: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(log_sigma)
        if mu_p is None or log_sigma_p is None:
            inverse, difference, deviation, log_ratio = None, None, mu, log_sigma
        else:
            inverse, difference = torch.neg(log_sigma_p).exp_(), mu - mu_p
            deviation, log_ratio = difference * inverse, log_sigma - log_sigma_p
        log_square = 2 * log_ratio
        square = torch.exp(log_square)
        cost = deviation.square().add_(_excess(log_square)).mul_(0.5)
        ctx.save_for_backward(sigma, epsilon, inverse, difference, deviation, square)
        return (sigma * epsilon).add_(mu), cost.sum(tuple(range(2, cost.ndim))) if cost.ndim > 2 else cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_z: Tensor, of_cost: Tensor) -> tuple[Tensor | None, ...]:
        # In the order of autograd's sums and products for `kl` and `sample`, so that the bits are the same.
        sigma, epsilon, inverse, difference, deviation, square = ctx.saved_tensors
        of_cost = of_cost.view(*of_cost.shape, *(1 for _ in sigma.shape[2:])) if sigma.ndim > 2 else of_cost
        of_ratio = (square * of_cost).sub_(of_cost)
        of_log_sigma = (of_z * epsilon).mul_(sigma).add_(of_ratio)
        of_deviation = deviation * of_cost
        if inverse is None:
            return of_deviation.add_(of_z), of_log_sigma, None, None, None
        of_log_sigma_p = (of_deviation * difference).mul_(inverse).add_(of_ratio).neg_()
        of_mu = of_deviation.mul_(inverse)
        return of_z + of_mu, of_log_sigma, -of_mu, of_log_sigma_p, None


class _Bounded(torch.autograd.Function):
    """Without autograd's two factors of 8 in the backward pass, which cancel."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        ratio = (raw / LOG_SIGMA_BOUND).tanh_()
        ctx.save_for_backward(ratio)
        return LOG_SIGMA_BOUND * ratio

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (ratio,) = ctx.saved_tensors
        of_raw: Tensor = torch.ops.aten.tanh_backward(gradient, ratio)
        return of_raw


class Posterior(nn.Module):
    """The contract of a posterior: from the encoder's raw parameters to q(z|x). Override `forward`."""

    def __init__(self, config: PosteriorConfig, latents: int) -> None:  # noqa: ARG002
        """latents: the size of the latent vector, or the channels of a map or of each group."""
        super().__init__()

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:
        """Compute q(z|x) from raw [B, num_params(latents), ...], float32 or float64. prior: that of a ladder's group, or None."""
        raise NotImplementedError


class Diagonal(Posterior):
    """Diagonal q(z|x) from raw [B, 2 Z, ...]: mean and log sigma."""

    def __init__(self, config: DiagonalConfig, latents: int) -> None:
        super().__init__(config, latents)
        self._bounded = config.bounded

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Split raw into the mean and log sigma, which is bounded smoothly unless the section says otherwise."""
        mu, log_sigma = raw.chunk(2, dim=1)
        return Gaussian(mu, bounded(log_sigma) if self._bounded else log_sigma)


class Isotropic(Posterior):
    """Isotropic q(z|x) from raw [B, Z + 1, ...]: mean, and one log sigma."""

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Split raw into the mean and log sigma, which is bounded smoothly."""
        mu, log_sigma = raw[:, :-1], raw[:, -1:]
        return Gaussian(mu, bounded(log_sigma).expand_as(mu))


class Fixed(Posterior):
    """q(z|x) with constant standard deviations, one for each channel, from raw [B, Z, ...]: the mean."""

    log_sigmas: Tensor

    def __init__(self, config: FixedConfig, latents: int) -> None:
        super().__init__(config, latents)
        self.register_buffer("log_sigmas", torch.tensor(config.sigmas(latents)).log(), persistent=False)

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:  # noqa: ARG002
        """Combine the mean with the constant standard deviations."""
        shape = (1, -1, *(1 for _ in raw.shape[2:]))
        return Gaussian(raw, self.log_sigmas.to(raw.dtype).view(shape).expand_as(raw))


class Relative(Posterior):
    """q(z|x) relative to the prior, from raw [B, 2 Z, ...]: differences of mean and log sigma."""

    def forward(self, raw: Tensor, prior: Gaussian | None) -> Gaussian:
        """Add the differences to the prior; raw zeros return the prior itself."""
        assert prior is not None, "refused in the recipe"
        moved, scaled = raw.chunk(2, dim=1)
        return Gaussian(prior.mu + moved, prior.log_sigma + bounded(scaled))
