"""The ELBO of a data set and its other metrics, each sample weighed once over all ranks."""

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
COLLAPSED_NATS, COLLAPSED_IMAGES = 0.01, 0.99
PER_IMAGE = 4  # columns before those by group and by latent


@torch.no_grad()
def evaluate(
    model: VAE, batches: Iterable[Batch], *, seed: int, max_skipped: float = 1.0
) -> dict[str, float]:
    """One-sample ELBO with the running sigma, in float32. The noise of an image depends on (seed, its number) alone.

    Returns what `model_metrics` does; images, the number evaluated, and skipped, the number that could not be used
    (absent when 0). Raises DataError when more than the fraction `max_skipped` could not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: Tensor | None = None
    skipped_here = 0
    for batch in batches:
        images, slots, mask = batch.images.to(device), batch.slots.to(device), batch.mask.to(device)
        terms = model(images, noise.Stream(seed, 0, slots), mask)
        own = column_sums(terms, mask)
        sums = own if sums is None else sums + own
        skipped_here += len(batch.faults)
    model.train(was_training)
    if sums is None:
        raise comm.known_to_all(
            DataError("there are no images to evaluate; give data.val a set that has some")
        )
    total = comm.all_reduce_sum(torch.cat([sums, sums.new_tensor([skipped_here])]))
    used, skipped = float(total[-2]), float(total[-1])
    if not used or skipped > max_skipped * (used + skipped):
        raise comm.known_to_all(
            DataError(
                f"{skipped:.0f} of {used + skipped:.0f} images to evaluate cannot be used, data.max_skipped is "
                f"{max_skipped}; `vaescale verify-shards DIR --deep` names them"
            )
        )
    metrics = {**model_metrics(model, total[:-2] / used), "images": used}
    return metrics | ({"skipped": skipped} if skipped else {})


def column_sums(terms: Terms, mask: Tensor) -> Tensor:
    """Sums over images of what `model_metrics` takes the means of, and their number, float64 [4 + G + 3 L + 1].

    log_px, kl, squared error, variance | the KL of each group | of each latent whether its KL is below 0.01 nats,
    the posterior's mean and its square.
    """
    first = torch.stack([terms.log_px, terms.kl.sum(1), terms.squared_error, terms.variance], dim=1)
    parts = [first, terms.kl, terms.latent_kl < COLLAPSED_NATS, terms.unit_mean, terms.unit_square]
    rows = torch.cat([part.detach().double() for part in parts], dim=1)
    sums = torch.where(mask[:, None], rows, 0.0).sum(0)
    return torch.cat([sums, mask.sum().double()[None]])


def model_metrics(model: VAE, means: Tensor) -> dict[str, float]:
    """The metrics from the means over images of what `column_sums` sums, float64 [4 + G + 3 L].

    neg_elbo_nats, log_px_nats and kl_nats (per image), bits_per_dim, mse (per value, images in [0, 1]), and sigma: the
    likelihood's noise level, or the root of the mean variance of p(x|z) when it depends on z (absent when there is none).
    A likelihood that fits sigma to each image itself has no bound: then the two are called neg_profile_elbo_nats and
    profile_log_px_nats, and there are no bits_per_dim. The likelihood's `progress` is added.

    active_units: latents whose posterior mean, measured from the prior's in its standard deviations, has a variance above
    0.01 over the images and the places of a map (Burda, Grosse & Salakhutdinov 2016, section 5.1). collapsed_share: of the latents, those whose KL
    is below 0.01 nats for at least 99% of the images (Lucas et al. 2019, definition 1, with epsilon = delta = 0.01).
    group_kl_nats/N: of each group, where there are several.
    """
    likelihood, dimensions = model.likelihood, math.prod(model.image_shape)
    groups, latents = len(model.group_sizes), model.num_latents
    log_px, kl, squared_error, variance = means[:PER_IMAGE].tolist()
    by_group, below, unit_mean, unit_square = torch.split(
        means[PER_IMAGE:], [groups, latents, latents, latents]
    )
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
    metrics["active_units"] = float((unit_square - unit_mean.square() > ACTIVE_VARIANCE).sum())
    metrics["collapsed_share"] = float((below >= COLLAPSED_IMAGES).double().mean())
    if groups > 1:
        metrics |= {f"group_kl_nats/{number:02d}": nats for number, nats in enumerate(by_group.tolist())}
    return metrics | {name: float(value) for name, value in likelihood.progress.items()}


def protocol(likelihood: Likelihood) -> dict[str, str]:
    """Sentences on what the metrics of `evaluate` mean for this likelihood, by name."""
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
        "log_px_nats": "E log p(x|z) of the same draw: the reconstruction term of the bound, not log p(x)",
        "mse": "of means decoded from that draw, per value",
        "bits_per_dim": bits,
        "sigma": "root of the mean variance of p(x|z); an optimal sigma is the running average of training",
        "active_units": "latents whose posterior mean, in the prior's standard deviations, varies by more than 0.01 (over images; of a map, over places too)",
        "collapsed_share": "of the latents, those with a KL below 0.01 nats for 99% of the images",
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
