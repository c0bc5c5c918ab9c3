"""The ELBO of a data set and what belongs beside it, each sample weighed once over all ranks."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import DataError
from vaescale.models.vae import VAE

ACTIVE_VARIANCE = 0.01


@torch.no_grad()
def evaluate(
    model: VAE, batches: Iterable[Batch], *, seed: int, max_skipped: float = 1.0
) -> dict[str, float]:
    """One-sample ELBO with the running sigma, in float32. The noise of an image depends on (seed, its number) alone.

    Returns neg_elbo_nats, log_px_nats and kl_nats (per image), bits_per_dim, mse (per value, images in [0, 1]),
    sigma (absent when the likelihood has none), active_units: latents whose posterior mean has a variance above 0.01 over the
    data (Burda, Grosse & Salakhutdinov 2016, section 5.1), images, the number evaluated, and
    skipped, the number that could not be used (absent when 0). Raises DataError when more than
    the fraction `max_skipped` could not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(5 + 2 * model.latent_dim, dtype=torch.float64, device=device)
    for batch in batches:
        images, slots, mask = batch.images.to(device), batch.slots.to(device), batch.mask.to(device)
        terms = model(images, noise.Stream(seed, 0, slots), mask)
        mu = terms.mu.double()
        columns = [terms.log_px, terms.kl.sum(1), terms.squared_error, torch.ones_like(terms.log_px)]
        rows = torch.cat([torch.stack([column.double() for column in columns], 1), mu, mu.square()], dim=1)
        sums[:-1] += torch.where(mask[:, None], rows, 0.0).sum(0)
        sums[-1] += len(batch.faults)
    model.train(was_training)
    total = comm.all_reduce_sum(sums)
    used, skipped = float(total[3]), float(total[-1])
    if not used or skipped > max_skipped * (used + skipped):
        raise DataError(
            f"{skipped:.0f} of {used + skipped:.0f} images to evaluate cannot be used, data.max_skipped is "
            f"{max_skipped}; `vaescale verify-shards DIR --deep` names them"
        )
    return _metrics(total, model)


def _metrics(sums: Tensor, model: VAE) -> dict[str, float]:
    count, skipped = sums[3], float(sums[-1])
    log_px, kl, squared_error = (sums[:3] / count).tolist()
    mu, mu_squared = (sums[4:-1] / count).chunk(2)
    dimensions = math.prod(model.image_shape)
    metrics = {
        "neg_elbo_nats": kl - log_px,
        "log_px_nats": log_px,
        "kl_nats": kl,
        "bits_per_dim": bits_per_dim(kl - log_px, dimensions),
        "mse": squared_error / dimensions,
        "active_units": float((mu_squared - mu.square() > ACTIVE_VARIANCE).sum()),
        "images": float(count),
    }
    if skipped:
        metrics["skipped"] = skipped
    if model.likelihood.sigma is not None:
        metrics["sigma"] = float(model.likelihood.sigma)
    return metrics


def bits_per_dim(nll_nats: float, dimensions: int) -> float:
    """Bits per dimension of 8-bit images from a density on [0, 1]: nll / (D ln 2) + 8.

    A density on [0, 1] gives each of 256 levels a cell of width 1/256, hence the 8 bits. Theis et al. 2016, section 3.1.
    """
    return nll_nats / (dimensions * math.log(2)) + 8
