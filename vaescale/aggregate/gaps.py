"""Why a bound is not tight: the encoder's share and the Gaussian family's. Cremer, Li & Duvenaud 2018, eq. 7.

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])
                         approximation gap      amortization gap

q* is the best diagonal Gaussian for each x, found by gradient ascent from the encoder's; log p(x) is bounded from below by
importance sampling, and the approximation gap with it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Request
from vaescale.data.lookup import evenly
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.models.flat import FlatVAE
from vaescale.models.posterior import Gaussian, kl
from vaescale.models.vae import VAE
from vaescale.system.console import Progress

RATE = 1e-2
DRAWS = 4  # of each image in a step
VALUES = 2000 * 784  # of images times draws that are decoded at once
FAR = 1 << 20
BATCH = 32


class Gaps(NamedTuple):
    """Bounds of each image, nats [B] float64: L[q], L[q*], and the importance-weighted bound of log p(x)."""

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


def mean_gaps(
    model: FlatVAE, reader: ShardReader, images: int, *, steps: int, importance_samples: int, seed: int
) -> dict[str, Any]:
    """The mean gaps of `images` images (at least two) at equal distances, in nats with standard errors. All ranks call it."""
    rows = torch.cat(comm.gather_object(_share(model, reader, images, steps, importance_samples, seed)))
    amortized, optimized, log_px = rows.unbind(1)
    differences = {"amortization": optimized - amortized, "approximation": log_px - optimized}
    return {
        "images": len(rows),
        "steps": steps,
        "importance_samples": importance_samples,
        "elbo_nats": float(amortized.mean()),
        "optimized_elbo_nats": float(optimized.mean()),
        "log_px_nats": float(log_px.mean()),
        **{f"{name}_gap_nats": float(gap.mean()) for name, gap in differences.items()},
        **{f"{name}_gap_error": float(gap.std() / len(rows) ** 0.5) for name, gap in differences.items()},
    }


def refuse_gaps(model: VAE) -> FlatVAE:
    """The model, if its gaps can be measured. Raises UserError for a ladder, and for a likelihood without a bound."""
    if not isinstance(model, FlatVAE) or model.likelihood.reads_x:
        raise UserError(
            "--gaps is for a single latent vector and a likelihood that bounds log p(x); leave it out here"
        )
    return model


def inference_gaps(
    model: FlatVAE, images: Tensor, stream: noise.Stream, *, steps: int = 300, importance_samples: int = 1000
) -> Gaps:
    """Measure the gaps of images uint8 [B, C, H, W], each bound by `importance_samples` draws.

    log p(x) is bounded by draws of q*, because the encoder's draws are poor where the encoder is. The noise of an image depends
    on the stream's seed and its slot alone.
    """
    x = model.target(images, stream)
    with torch.no_grad():
        q = model.posterior(x)
        amortized, _ = _bounds(model, x, q, stream._replace(step=0), importance_samples)
    best = _optimized(model, x, q, stream, steps)
    with torch.no_grad():
        optimized, log_px = _bounds(model, x, best, stream._replace(step=0), importance_samples)
    return Gaps(amortized, optimized, log_px)


def _share(
    model: FlatVAE, reader: ShardReader, images: int, steps: int, importance_samples: int, seed: int
) -> Tensor:
    """The bounds of this rank's share of the images, float64 [N, 3] on the CPU. Images that cannot be used are left out."""
    device = next(model.parameters()).device
    rows = torch.zeros(0, len(Gaps._fields), dtype=torch.float64)
    numbers = evenly(len(reader), images)[comm.rank() :: comm.world_size()]
    with Progress("gaps", len(numbers), shown=comm.is_main()) as progress:
        for batch in torch.split(numbers, BATCH):
            fetched = reader.__getitems__(Request(np.asarray(batch), refill=False))
            if not fetched.usable.any():
                continue
            gaps = inference_gaps(
                model,
                fetched.images[fetched.usable].to(device),
                noise.Stream(seed, 0, batch[fetched.usable].to(device)),
                steps=steps,
                importance_samples=importance_samples,
            )
            rows = torch.cat([rows, torch.stack(gaps, dim=1).cpu()])
            progress.update(len(rows), "images")
    return rows


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
