"""A second VAE over the latents of a first one, as a prior: u ~ N(0, I), z ~ p(z|u), then the first one's p(x|z).

Where the first VAE's q(z) differs from N(0, I), the second one learns it from draws of q(z|x), and its own aggregate posterior is
nearer to N(0, I). Dai & Wipf 2019, "Diagnosing and enhancing VAE models", section 4.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaescale import noise
from vaescale.data.latent_shards import Standardized
from vaescale.models.vae import VAE

SEED = 1 << 33  # added to that of samples: p(z|u) and p(x|z) must not draw the same noise


class SecondStage(NamedTuple):
    """A trained model of latents.

    scale: of the latents that it was trained on, None if they are the first model's own. identity: of the run and its weights, as
    results keep it.
    """

    model: VAE
    scale: Standardized | None
    identity: dict[str, Any]


@torch.no_grad()
def draws(stage: SecondStage, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
    """Draws float32 [B, Z] of the first model's latents, one per slot: a function of (seed, step, slot) only.

    temperature: factor of the standard deviations of u (of every group of a ladder) and of p(z|u).
    """
    stream = stream._replace(seed=stream.seed + SEED)
    likelihood = stage.model.likelihood
    params = stage.model.from_prior(stream, temperature)
    mean = likelihood.mean(params).float()
    z = mean + temperature * (likelihood.sample(params, stream).float() - mean)
    if stage.scale is not None:
        centre, width = (torch.tensor(values, device=z.device).view(-1, 1, 1) for values in stage.scale)
        z = centre + width * z
    return z.flatten(1)
