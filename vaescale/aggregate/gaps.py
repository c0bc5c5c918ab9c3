"""Why a bound is not tight: the encoder's share and the Gaussian family's. Cremer, Li & Duvenaud 2018, eq. 7.

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])
                         approximation gap      amortization gap

q* is the best diagonal Gaussian for each x, found by gradient ascent from the encoder's; log p(x) is bounded from below by
importance sampling, and the approximation gap with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.evaluation.importance import log_mean_weight
from vaescale.models.flat import FlatVAE
from vaescale.posterior import Gaussian, kl

RATE = 1e-2
DRAWS = 4  # of each image in a step
VALUES = 2000 * 784  # of images times draws that are decoded at once
FAR = 1 << 20


class Gaps(NamedTuple):
    """Of each image, nats [B] float64: L[q], L[q*], and the importance-weighted bound of log p(x)."""

    amortized: Tensor
    optimized: Tensor
    log_px: Tensor

    @property
    def amortization(self) -> Tensor:
        """L[q*] - L[q]."""
        return self.optimized - self.amortized

    @property
    def approximation(self) -> Tensor:
        """log p(x) - L[q*], at least."""
        return self.log_px - self.optimized


def inference_gaps(
    model: FlatVAE, images: Tensor, stream: noise.Stream, *, steps: int = 300, importance_samples: int = 1000
) -> Gaps:
    """Of images uint8 [B, C, H, W]; each bound is of `importance_samples` draws. The noise of an image depends on the stream's
    seed and its slot alone.
    """
    x = model.target(images, stream)
    with torch.no_grad():
        q = model.posterior(x)
        amortized = _bound(model, x, q, stream._replace(step=0), importance_samples)
    best = _optimized(model, x, q, stream, steps)
    with torch.no_grad():
        optimized = torch.maximum(
            amortized, _bound(model, x, best, stream._replace(step=0), importance_samples)
        )
        log_px = log_mean_weight(model, images, stream, importance_samples)
    return Gaps(amortized, optimized, log_px)


def _optimized(model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, steps: int) -> Gaussian:
    mu, log_sigma = (part.detach().clone().requires_grad_() for part in q)
    optimizer = torch.optim.Adam([mu, log_sigma], lr=RATE)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / steps)
        with torch.enable_grad():
            bound = _bound(model, x, Gaussian(mu, log_sigma), stream._replace(step=step), DRAWS)
            # Not backward(), which would leave gradients at the decoder's weights.
            mu.grad, log_sigma.grad = torch.autograd.grad(-bound.sum(), (mu, log_sigma))
        optimizer.step()
    return Gaussian(mu.detach(), log_sigma.detach())


def _bound(model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, draws: int) -> Tensor:
    """L[q] of each image: log p(x|z) over some draws, and the KL in closed form. float64 [B]."""
    total = x.new_zeros(len(x), dtype=torch.float64)
    at_once = max(1, VALUES // max(1, x.numel()))
    for start in range(0, draws, at_once):
        many = min(at_once, draws - start)
        # Draws beyond the first lot have steps of their own, far from those of the ascent.
        own = stream._replace(step=stream.step + FAR * (start // at_once))
        epsilon = noise.normal(own, noise.POSTERIOR, (many, *model.latent_shape)).to(q.mu)
        z = q.mu[:, None] + torch.exp(q.log_sigma)[:, None] * epsilon
        params = model.decode(z.flatten(0, 1).flatten(1))
        mask = torch.ones(len(x) * many, dtype=torch.bool, device=x.device)
        log_px = model.likelihood.log_prob(x.repeat_interleave(many, 0), params, mask)
        total = total + log_px.view(len(x), many).double().sum(1)
    return total / draws - kl(q).flatten(1).sum(1).double()
