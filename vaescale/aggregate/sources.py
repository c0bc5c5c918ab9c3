"""Latents from several sources, to compare their decoded pictures: q(z), a mixture, the prior, and a wider prior."""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.sampling import prior_draws
from vaescale.data.lookup import evenly
from vaescale.mixtures.gaussian import Mixture, sample
from vaescale.mixtures.points import Moments
from vaescale.models.vae import VAE

DRAWS = 1000  # from each source
FAR = 3.0  # width of the wider prior, in the prior's standard deviations


@torch.no_grad()
def draws_by_source(model: VAE, moments: Moments, mixture: Mixture | None, *, seed: int) -> dict[str, Tensor]:
    """Draws [B, Z] from q(z), the mixture if given, the prior, and a prior three times as wide, on every rank.

    moments: the moments of q(z|x) of the training images.
    """
    device = next(model.parameters()).device
    slots = torch.arange(DRAWS, device=device)
    draws = {"posterior": posterior_draws(moments, seed=seed).to(device)}
    if mixture is not None:
        draws[f"mixture of {len(mixture.weights)}"] = sample(mixture, noise.Stream(seed, 3, slots))
    for name, scale in (("prior", 1.0), (f"prior x {FAR:g}", FAR)):
        draws[name] = prior_draws(model, noise.Stream(seed, 1, slots), scale)
    return draws


def posterior_draws(moments: Moments, *, seed: int) -> Tensor:
    """A draw from q(z|x) for each of `DRAWS` evenly spaced images, float32 [B, Z], on every rank."""
    wanted = evenly(moments.count, DRAWS)
    mean, variance = moments.rows(wanted), moments.variances(wanted)
    epsilon = noise.normal(noise.Stream(seed, 1, wanted), noise.POSTERIOR, (moments.size,)).double()
    return (mean + variance.sqrt() * epsilon).float()
