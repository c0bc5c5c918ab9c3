"""Samples of the aggregate posterior: every image of a data set through the encoder."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vaescale import noise
from vaescale.data.batch import Batch
from vaescale.errors import TrainingStopped
from vaescale.models.flat import FlatVAE


@torch.no_grad()
def sample_aggregate(
    model: FlatVAE, batches: Iterable[Batch], *, seed: int, samples_per_image: int
) -> Tensor:
    """Draws from q(z|x) of each image, float64 [images * samples_per_image, Z] on the CPU.

    Raises TrainingStopped when the encoder returns NaN or Inf.
    """
    device = next(model.parameters()).device
    latents = []
    for batch in batches:
        stream = noise.Stream(seed, 0, batch.slots.to(device))
        q = model.posterior(model.target(batch.images.to(device), stream))
        mu, log_sigma = q.mu.flatten(1), q.log_sigma.flatten(1)
        shape = (samples_per_image, model.latent_dim)
        z = mu[:, None] + torch.exp(log_sigma)[:, None] * noise.normal(stream, noise.POSTERIOR, shape)
        latents.append(z[batch.mask].flatten(0, 1).double().cpu())
    z = torch.cat(latents)
    if not torch.isfinite(z).all():
        raise TrainingStopped("the encoder returns NaN or Inf; train again with a lower optimizer.lr")
    return z
