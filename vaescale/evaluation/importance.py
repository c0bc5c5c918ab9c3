"""log p(x) of a data set by importance sampling: the bound of Burda, Grosse & Salakhutdinov 2016, eq. 8.

L_K = E_x[log 1/K sum_k p(x, z_k) / q(z_k|x)],   ELBO = E[L_1] <= E[L_K] <= log p(x)
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.models.vae import VAE
from vaescale.system.console import Progress

DRAWS = 4  # per image in one step of the stream: draw k is number k % 4 of step k // 4
VALUES = 2000 * 784  # maximum number of values (images x draws x pixels) to decode at once
IMPORTANCE = (
    *("neg_iwae_nats", "iwae_bits_per_dim", "neg_iwae_standard_error", "importance_neg_elbo_nats"),
    *("importance_samples", "importance_images", "effective_samples"),
)


@torch.no_grad()
def importance_weighted(
    model: VAE, batches: Iterable[Batch], *, seed: int, samples: int, most_images: int | None = None
) -> dict[str, float]:
    """The mean of -L_K with the running sigma, in float32, over all images or the first `most_images`.

    Returns neg_iwae_nats, its value as iwae_bits_per_dim, its standard error over the images; importance_neg_elbo_nats, the
    negative ELBO of the same images and draws; importance_samples (K), importance_images; and effective_samples, the mean over
    images of (sum w)^2 / sum w^2 (Kong 1992). Draw k of an image is a function of (seed, image number, k), so a larger K adds
    draws to those of a smaller one. Raises UserError for a likelihood that fits sigma to each image, which gives no bound,
    DataError when no image can be used.
    """
    if model.likelihood.reads_x:
        raise UserError(
            "this likelihood fits sigma to each image, which gives no bound of log p(x); leave importance samples out"
        )
    was_training = model.training
    model.eval()
    sums = _sums(model, batches, seed, samples, most_images)
    model.train(was_training)
    total, squares, elbo, effective, count = comm.all_reduce_sum(sums).tolist()
    if not count:
        raise comm.known_to_all(
            DataError("no image could be used; `vaescale verify-shards DIR --deep` names the faults")
        )
    mean, likelihood = total / count, model.likelihood
    variance = max(0.0, squares / count - mean**2)
    return {
        "neg_iwae_nats": -mean,
        "iwae_bits_per_dim": bits_per_dim(-mean, likelihood.dimensions, likelihood.measure),
        "neg_iwae_standard_error": math.sqrt(variance / count),
        "importance_neg_elbo_nats": -elbo / count,
        "importance_samples": float(samples),
        "importance_images": count,
        "effective_samples": effective / count,
    }


def _sums(model: VAE, batches: Iterable[Batch], seed: int, samples: int, most_images: int | None) -> Tensor:
    """Sums over this rank's images of L_K, L_K^2, the ELBO and the effective samples, and their number, float64 [5]."""
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    at_once = max(1, VALUES // (DRAWS * math.prod(model.image_shape)))
    done = 0
    with Progress("importance samples", 0, shown=comm.is_main()) as progress:
        for batch in batches:
            images, slots = batch.images.to(device), batch.slots.to(device)
            mask = batch.mask.to(device) & (slots < (most_images or math.inf))
            for rows in torch.split(mask.nonzero()[:, 0], at_once):
                before = done

                def report(draws: int, before: int = before) -> None:
                    progress.update(before + draws, "draws")

                stream = noise.Stream(seed, 0, slots[rows])
                bound, elbo, effective = _bounds(model, images[rows], stream, samples, report)
                count = bound.new_tensor(len(rows))
                sums += torch.stack([bound.sum(), bound.square().sum(), elbo.sum(), effective.sum(), count])
                done += len(rows) * samples
            if most_images is not None and int(slots.max()) >= most_images:
                break
    return sums


def _bounds(
    model: VAE, images: Tensor, stream: noise.Stream, samples: int, report: Callable[[int], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """L_K of each image, its ELBO with the same draws, and its effective number of samples, float64 [B] each.

    images: uint8 [B, C, H, W]. report: called with the number of draws done.
    """
    x = model.target(images, stream)
    mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    squares, logs = total, torch.zeros_like(total)
    for start in range(0, samples, DRAWS):
        terms = model.terms(x, stream._replace(step=start // DRAWS), mask, min(DRAWS, samples - start))
        weights = terms.log_weights.double()
        total = torch.logaddexp(total, torch.logsumexp(weights, dim=1))
        squares = torch.logaddexp(squares, torch.logsumexp(2 * weights, dim=1))
        logs = logs + weights.sum(1)
        report(len(x) * min(start + DRAWS, samples))
    return total - math.log(samples), logs / samples, torch.exp(2 * total - squares)
