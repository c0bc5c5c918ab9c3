"""Refine latents by gradient descent to a smaller sigma of the decoder.

    minimize over z:    D mean log sigma(z) - w log p(z)                 in nats, D values of an image, p a prior or a mixture

The first term is the entropy of p(x|z) up to a constant. Without the second term, z may leave the region that the decoder
was trained on; therefore the result includes the density before and after.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.sampling import prior_draws
from vaescale.errors import UserError
from vaescale.mixtures import gaussian
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.vae import VAE
from vaescale.system.uncompiled import Adam


class Refined(NamedTuple):
    """z [B, Z], mean log sigma [B] over an image's values and log density [B] in nats, each before and after."""

    before: Tensor
    after: Tensor
    log_sigma_before: Tensor
    log_sigma_after: Tensor
    density_before: Tensor
    density_after: Tensor


class RefinedSamples(NamedTuple):
    """Latents before and after refinement, and their decoded means [B, C, H, W]."""

    latents: Refined
    images_before: Tensor
    images_after: Tensor


def refine_draws(
    model: VAE,
    mixture: Mixture | None,
    stream: noise.Stream,
    *,
    steps: int,
    rate: float,
    weight: float,
    temperature: float,
) -> RefinedSamples:
    """Draw one z per slot of the stream from the prior, or from a mixture if given, and `refine` it.

    temperature: factor of the standard deviations. Raises UserError when sigma does not depend on z.
    """
    with torch.no_grad():
        if mixture is None:
            z = prior_draws(model, stream, temperature)
        else:
            mixture = gaussian.on(mixture, stream.slots.device)
            z = gaussian.sample(mixture, stream, temperature)

    def density(points: Tensor) -> Tensor:
        if mixture is None:
            return model.prior_log_density(points)
        return gaussian.log_density(mixture, points.double())

    latents = refine(model, z, stream, density, steps=steps, rate=rate, weight=weight)
    with torch.no_grad():
        before, after = (
            model.likelihood.mean(model.decode(z, stream)).float() for z in (latents.before, latents.after)
        )
    return RefinedSamples(latents, before, after)


def refine(
    model: VAE,
    z: Tensor,
    stream: noise.Stream,
    log_density: Callable[[Tensor], Tensor],
    *,
    steps: int,
    rate: float = 0.02,
    weight: float = 0.0,
) -> Refined:
    """Move z [B, Z] by `steps` of Adam (Kingma & Ba 2015) with learning rate `rate`, each row independently.

    stream: noise for the lower groups of a ladder. log_density: a function from z [B, Z] to [B] in nats. weight: w above. Raises UserError when sigma
    does not depend on z.
    """
    moved = z.detach().clone().requires_grad_()
    optimizer = Adam([moved], lr=rate)
    dimensions = model.likelihood.dimensions
    with torch.enable_grad():
        for _ in range(steps):
            cost = dimensions * mean_log_sigma(model, moved, stream)
            if weight:
                cost = cost - weight * log_density(moved)
            # Not backward(), which would add gradients to the decoder's weights.
            (moved.grad,) = torch.autograd.grad(cost.sum(), moved)
            optimizer.step()
    after = moved.detach()
    with torch.no_grad():
        measured = [
            function(points)
            for function in (lambda points: mean_log_sigma(model, points, stream), log_density)
            for points in (z, after)
        ]
    return Refined(z, after, *measured)


def mean_log_sigma(model: VAE, z: Tensor, stream: noise.Stream) -> Tensor:
    """The mean over an image's values of log sigma(z), [B]. Raises UserError when sigma does not depend on z."""
    variance = model.likelihood.variance(model.decode(z, stream))
    if variance is None or variance.shape[0] != len(z):
        raise UserError(
            "this decoder's sigma does not depend on z; train with likelihood.kind gaussian or laplace, and likelihood.sigma=predicted"
        )
    return 0.5 * variance.flatten(1).log().mean(1)
