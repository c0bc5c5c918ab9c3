"""Inference gaps: the parts of the ELBO's slack from the encoder and from the Gaussian family. Cremer et al. 2018, eq. 7.

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])
                         approximation gap      amortization gap

q* is the best diagonal Gaussian for each x, found by gradient ascent from q. Importance sampling bounds log p(x) from below, so
the approximation gap is a lower bound too.
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
from vaescale.evaluation.likelihood import refuse_without_bound
from vaescale.models.flat import FlatVAE
from vaescale.models.posterior import Gaussian, kl
from vaescale.models.vae import VAE
from vaescale.system.console import Progress
from vaescale.system.uncompiled import Adam

RATE = 1e-2
DRAWS = 4  # per image in a step of ascent
VALUES = 2000 * 784  # maximum number of values (images x draws x pixels) to decode at once
FAR = 1 << 20
MOST_DRAWS = DRAWS * (noise.STEPS // FAR) << 16  # there are 2^16 groups of a purpose
BATCH = 32


class Gaps(NamedTuple):
    """Bounds of each image, nats [B] float64: L[q], L[q*], and the importance-weighted bound of log p(x)."""

    amortized: Tensor
    optimized: Tensor
    log_px: Tensor

    @property
    def amortization(self) -> Tensor:
        """The amortization gap, L[q*] - L[q]."""
        return self.optimized - self.amortized

    @property
    def approximation(self) -> Tensor:
        """A lower bound of the approximation gap, log p(x) - L[q*]."""
        return self.log_px - self.optimized


def mean_gaps(
    model: FlatVAE, reader: ShardReader, images: int, *, steps: int, importance_samples: int, seed: int
) -> dict[str, Any]:
    """The mean gaps of at least two evenly spaced images, in nats with standard errors. All ranks call it.

    Raises UserError for more steps or draws than have noise of their own.
    """
    if steps >= FAR or importance_samples > MOST_DRAWS:
        raise UserError(
            f"gaps have noise for {FAR - 1} steps and {MOST_DRAWS} importance samples (got {steps} and {importance_samples})"
        )
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
    refuse_without_bound(model, "leave --gaps out")
    if not isinstance(model, FlatVAE) or model.likelihood.reads_x:
        raise UserError(
            "--gaps needs a single latent vector and a likelihood that bounds log p(x); leave it out for this run"
        )
    return model


def inference_gaps(
    model: FlatVAE, images: Tensor, stream: noise.Stream, *, steps: int = 300, importance_samples: int = 1000
) -> Gaps:
    """Measure the gaps of images uint8 [B, C, H, W], with `importance_samples` draws for each bound.

    The bound of log p(x) uses draws of q*, because draws of q are poor where the encoder is poor. The noise of an image depends
    only on the stream's seed and the image's slot.
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
    """The bounds of this rank's share of the images, float64 [N, 3] on the CPU. Unusable images are left out."""
    device = next(model.parameters()).device
    rows = torch.zeros(0, len(Gaps._fields), dtype=torch.float64)
    numbers = evenly(len(reader), images)[comm.rank() :: comm.world_size()]
    with Progress("gaps", len(numbers), unit="images", shown=comm.is_main()) as progress:
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
            progress.update(len(rows))
    return rows


def _optimized(model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, steps: int) -> Gaussian:
    mu, log_sigma = (tensor.detach().clone().requires_grad_() for tensor in q)
    optimizer = Adam([mu, log_sigma], lr=RATE)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / steps)
        with torch.enable_grad():
            bound, _ = _bounds(model, x, Gaussian(mu, log_sigma), stream._replace(step=step), DRAWS)
            # Not backward(), which would add gradients to the decoder's weights.
            mu.grad, log_sigma.grad = torch.autograd.grad(-bound.sum(), (mu, log_sigma))
        optimizer.step()
    return Gaussian(mu.detach(), log_sigma.detach())


def _address(stream: noise.Stream, chunk: int) -> tuple[noise.Stream, int]:
    """The stream and the purpose of a chunk of draws: FAR steps apart, after those of the ascent, while a stream has steps, then
    with the purpose of a further group, which a flat model does not have.
    """
    group, number = divmod(chunk, noise.STEPS // FAR)
    return stream._replace(step=stream.step + FAR * number), noise.POSTERIOR + group


def _bounds(
    model: FlatVAE, x: Tensor, q: Gaussian, stream: noise.Stream, draws: int
) -> tuple[Tensor, Tensor]:
    """L[q] of each image with the KL in closed form, and log 1/K sum_k p(x, z_k) / q(z_k), float64 [B] each.

    The second is at least the first, up to sampling noise.
    """
    total = x.new_zeros(len(x), dtype=torch.float64)
    weights = torch.full_like(total, -torch.inf)
    most = DRAWS * max(1, VALUES // max(1, DRAWS * x.numel()))
    standard = Gaussian(torch.zeros_like(q.mu), torch.zeros_like(q.mu))
    for start in range(0, draws, most):
        count = min(most, draws - start)
        # Each chunk of DRAWS draws has its own address, so the noise does not depend on VALUES.
        chunks = [
            noise.normal(
                *_address(stream, first // DRAWS), (min(DRAWS, start + count - first), *model.latent_shape)
            )
            for first in range(start, start + count, DRAWS)
        ]
        epsilon = torch.cat(chunks, dim=1).to(q.mu)
        repeated = Gaussian(*(tensor.repeat_interleave(count, 0) for tensor in q))
        z = repeated.sample(epsilon.flatten(0, 1))
        params = model.decode(z.flatten(1))
        mask = torch.ones(len(z), dtype=torch.bool, device=x.device)
        log_px = model.likelihood.log_prob(x.repeat_interleave(count, 0), params, mask).double()
        zeros = Gaussian(*(tensor.repeat_interleave(count, 0) for tensor in standard))
        ratio = (zeros.log_density(z) - repeated.log_density(z)).flatten(1).double().sum(1)
        total = total + log_px.view(len(x), count).sum(1)
        weights = torch.logaddexp(weights, torch.logsumexp((log_px + ratio).view(len(x), count), dim=1))
    return total / draws - kl(q).flatten(1).sum(1).double(), weights - math.log(draws)
