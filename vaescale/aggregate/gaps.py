"""Why a bound is not tight: the encoder's share and the Gaussian family's. Cremer, Li & Duvenaud 2018, eq. 7.

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])
                         approximation gap      amortization gap

q* is the best diagonal Gaussian for each x, found by gradient ascent from the encoder's; log p(x) is bounded from below by
importance sampling, and the approximation gap with it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.flat import FlatVAE
from vaescale.models.posterior import Gaussian, kl

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
    """Of images uint8 [B, C, H, W]; each bound is of `importance_samples` draws, of q* where log p(x) is bounded: where the
    encoder is far off, so are its draws. The noise of an image depends on the stream's seed and its slot alone.
    """
    x = model.target(images, stream)
    with torch.no_grad():
        q = model.posterior(x)
        amortized, _ = _bounds(model, x, q, stream._replace(step=0), importance_samples)
    best = _optimized(model, x, q, stream, steps)
    with torch.no_grad():
        optimized, log_px = _bounds(model, x, best, stream._replace(step=0), importance_samples)
    return Gaps(amortized, optimized, log_px)


def _optimized(model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, steps: int) -> Gaussian:
    mu, log_sigma = (part.detach().clone().requires_grad_() for part in q)
    optimizer = torch.optim.Adam([mu, log_sigma], lr=RATE)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / steps)
        with torch.enable_grad():
            bound, _ = _bounds(model, x, Gaussian(mu, log_sigma), stream._replace(step=step), DRAWS)
            # Not backward(), which would leave gradients at the decoder's weights.
            mu.grad, log_sigma.grad = torch.autograd.grad(-bound.sum(), (mu, log_sigma))
        optimizer.step()
    return Gaussian(mu.detach(), log_sigma.detach())


def _bounds(
    model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, draws: int
) -> tuple[Tensor, Tensor]:
    """L[q] of each image, log p(x|z) over the draws less the KL in closed form; and log 1/K sum_k p(x, z_k) / q(z_k), which is
    no less but for that KL's noise. float64 [B].
    """
    total = x.new_zeros(len(x), dtype=torch.float64)
    weights = torch.full_like(total, -torch.inf)
    at_once = DRAWS * max(1, VALUES // max(1, DRAWS * x.numel()))
    standard = Gaussian(torch.zeros_like(q.mu), torch.zeros_like(q.mu))
    for start in range(0, draws, at_once):
        many = min(at_once, draws - start)
        # Each few draws have a step of their own, far from those of the ascent, however many come at once.
        lots = [
            noise.normal(
                stream._replace(step=stream.step + FAR * (place // DRAWS)),
                noise.POSTERIOR,
                (min(DRAWS, start + many - place), *model.latent_shape),
            )
            for place in range(start, start + many, DRAWS)
        ]
        epsilon = torch.cat(lots, dim=1).to(q.mu)
        repeated = Gaussian(*(part.repeat_interleave(many, 0) for part in q))
        z = repeated.sample(epsilon.flatten(0, 1))
        params = model.decode(z.flatten(1))
        mask = torch.ones(len(z), dtype=torch.bool, device=x.device)
        log_px = model.likelihood.log_prob(x.repeat_interleave(many, 0), params, mask).double()
        zeros = Gaussian(*(part.repeat_interleave(many, 0) for part in standard))
        ratio = (zeros.log_density(z) - repeated.log_density(z)).flatten(1).double().sum(1)
        total = total + log_px.view(len(x), many).sum(1)
        weights = torch.logaddexp(weights, torch.logsumexp((log_px + ratio).view(len(x), many), dim=1))
    return total / draws - kl(q).flatten(1).sum(1).double(), weights - math.log(draws)
