"""The ELBO of a data set and what belongs beside it, each sample weighed once over all ranks."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import DataError
from vaescale.likelihoods.base import Likelihood
from vaescale.models.vae import VAE, Terms

ACTIVE_VARIANCE = 0.01


@torch.no_grad()
def evaluate(
    model: VAE, batches: Iterable[Batch], *, seed: int, max_skipped: float = 1.0
) -> dict[str, float]:
    """One-sample ELBO with the running sigma, in float32. The noise of an image depends on (seed, its number) alone.

    Returns what `model_metrics` does; active_units: latents whose posterior mean has a variance above 0.01 over the data
    (Burda, Grosse & Salakhutdinov 2016, section 5.1); images, the number evaluated, and skipped, the number that could
    not be used (absent when 0). Raises DataError when more than the fraction `max_skipped` could not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(6 + 2 * model.latent_dim, dtype=torch.float64, device=device)
    for batch in batches:
        images, slots, mask = batch.images.to(device), batch.slots.to(device), batch.mask.to(device)
        terms = model(images, noise.Stream(seed, 0, slots), mask)
        mu = terms.mu.double()
        rows = torch.cat([metric_columns(terms), torch.ones_like(mu[:, :1]), mu, mu.square()], dim=1)
        sums[:-1] += torch.where(mask[:, None], rows, 0.0).sum(0)
        sums[-1] += len(batch.faults)
    model.train(was_training)
    total = comm.all_reduce_sum(sums)
    used, skipped = float(total[4]), float(total[-1])
    if not used or skipped > max_skipped * (used + skipped):
        raise DataError(
            f"{skipped:.0f} of {used + skipped:.0f} images to evaluate cannot be used, data.max_skipped is "
            f"{max_skipped}; `vaescale verify-shards DIR --deep` names them"
        )
    means = total[:-1] / used
    mu_mean, mu_square = means[5:].chunk(2)
    metrics = {
        **model_metrics(model, means[:4]),
        "active_units": float((mu_square - mu_mean.square() > ACTIVE_VARIANCE).sum()),
        "images": used,
    }
    return metrics | ({"skipped": skipped} if skipped else {})


def metric_columns(terms: Terms) -> Tensor:
    """float64 [B, 4]: log_px, kl, squared error and variance of each image."""
    columns = [terms.log_px, terms.kl.sum(1), terms.squared_error, terms.variance]
    return torch.stack([column.double() for column in columns], dim=1)


def model_metrics(model: VAE, means: Tensor) -> dict[str, float]:
    """The metrics from the means over images of `metric_columns`, float64 [4].

    neg_elbo_nats, log_px_nats and kl_nats (per image), bits_per_dim, mse (per value, images in [0, 1]), and sigma: the
    likelihood's noise level, or the root of the mean variance of p(x|z) when it depends on z (absent when there is none).
    A likelihood that fits sigma to each image itself bounds nothing: then the two are called neg_profile_elbo_nats and
    profile_log_px_nats, and there are no bits_per_dim. Besides, what the likelihood calls its progress.
    """
    likelihood, dimensions = model.likelihood, math.prod(model.image_shape)
    log_px, kl, squared_error, variance = means.tolist()
    of = "profile_" if likelihood.reads_x else ""
    metrics = {
        f"neg_{of}elbo_nats": kl - log_px,
        f"{of}log_px_nats": log_px,
        "kl_nats": kl,
        "mse": squared_error / dimensions,
    }
    if not likelihood.reads_x:
        metrics["bits_per_dim"] = bits_per_dim(kl - log_px, dimensions, likelihood.measure)
    if likelihood.sigma is not None:
        metrics["sigma"] = float(likelihood.sigma)
    elif math.isfinite(variance):
        metrics["sigma"] = math.sqrt(variance / dimensions)
    return metrics | {name: float(value) for name, value in likelihood.progress.items()}


def protocol(likelihood: Likelihood) -> dict[str, str]:
    """What the numbers of `evaluate` mean for this likelihood, in words."""
    formula = "neg_elbo_nats / (D ln 2)"
    if likelihood.measure == "mass":
        bits = f"{formula}: a mass over {likelihood.levels} levels, not comparable with densities or other levels"
    elif getattr(likelihood.config, "dequantize", False):
        bits = (
            f"{formula} + 8: a density of dequantized 8-bit images in [0, 1], an upper bound of a code length"
        )
    else:
        bits = f"{formula} + 8: a density of 8-bit images in [0, 1], not dequantized: no code length"
    words = {
        "bound": "one-sample ELBO per image, float32",
        "bits_per_dim": bits,
        "sigma": "root of the mean variance of p(x|z); an optimal sigma is the running average of training",
        "active_units": "latents whose posterior mean varies by more than 0.01 over the data",
    }
    if likelihood.reads_x:
        del words["bits_per_dim"]
        words["bound"] = "none: sigma is fitted to each image itself, which says nothing of unseen images"
    return words


def bits_per_dim(nll_nats: float, dimensions: int, measure: str = "density") -> float:
    """Bits per dimension of 8-bit images: nll / (D ln 2) of a mass, + 8 of a density on [0, 1].

    A density on [0, 1] gives each of 256 levels a cell of width 1/256, hence the 8 bits. Theis et al. 2016, section 3.1.
    """
    return nll_nats / (dimensions * math.log(2)) + (8 if measure == "density" else 0)
