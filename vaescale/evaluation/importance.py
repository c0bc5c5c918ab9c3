"""log p(x) of a data set by importance sampling: the bound of Burda, Grosse & Salakhutdinov 2016, eq. 8.

L_K = E_x[log 1/K sum_k p(x, z_k) / q(z_k|x)],   ELBO = E[L_1] <= E[L_K] <= log p(x)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim, refuse_without_bound
from vaescale.evaluation.measures import Seen
from vaescale.models.sequence_model import SequenceModel
from vaescale.models.vae import VAE, rows_of

DRAWS = 4  # per image in one step of the stream: draw k is number k % 4 of step k // 4
VALUES = 2000 * 784  # maximum number of values (images x draws x pixels) to decode at once
IMPORTANCE = (
    *("neg_iwae_nats", "iwae_bits_per_dim", "neg_iwae_standard_error", "importance_neg_elbo_nats"),
    *("importance_samples", "importance_images", "effective_samples"),
)


class ImportanceBound:
    """The mean of -L_K with the running sigma, in float32, over all images or the first `most_images`. samples: K.

    Gives neg_iwae_nats, its value as iwae_bits_per_dim (absent for real numbers), its standard error over the images; importance_neg_elbo_nats, the
    negative ELBO of the same images and draws; importance_samples (K), importance_images; and effective_samples, the mean over
    images of (sum w)^2 / sum w^2 (Kong 1992). Draw k of an image is a function of (seed, image number, k), so a larger K adds
    draws to those of a smaller one. Of sequences it is -log p(x_2..T | x_1), each with its own draws. Raises UserError for a likelihood that fits sigma to each image, which gives no bound,
    DataError when no image can be used.
    """

    def __init__(self, model: VAE, *, samples: int, most_images: int | None = None) -> None:
        refuse_without_bound(model, "leave importance samples out")
        if model.likelihood.reads_x:
            raise UserError(
                "this likelihood fits sigma to each image, which gives no bound of log p(x); leave importance samples out"
            )
        self._model, self._samples, self._most_images = model, samples, most_images
        # Of L_K, L_K^2, the ELBO and the effective samples, and the number of images.
        self._sums = torch.zeros(5, dtype=torch.float64, device=next(model.parameters()).device)
        self._at_once = most_at_once(model)

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:
        """Add the images of a batch that are among the first `most_images`."""
        used = (seen.mask & (seen.slots < (self._most_images or math.inf))).nonzero()[:, 0]
        parts = torch.split(used, self._at_once) if len(used) else ()
        for number, rows in enumerate(parts):
            before = number * self._at_once / len(used)

            def part(share: float, before: float = before, rows: Tensor = rows) -> None:
                report(before + share * len(rows) / len(used))

            bound, elbo, effective = bounds_of(self._model, seen, rows, samples=self._samples, report=part)
            count = bound.new_tensor(len(rows))
            self._sums += torch.stack([bound.sum(), bound.square().sum(), elbo.sum(), effective.sum(), count])

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        total, squares, elbo, effective, count = comm.all_reduce_sum(self._sums).tolist()
        if not count:
            raise comm.known_to_all(
                DataError("no image could be used; `vaescale verify-shards DIR --deep` names the faults")
            )
        mean = total / count
        variance = max(0.0, squares / count - mean**2)
        return {
            "neg_iwae_nats": -mean,
            **self._bits(-mean),
            "neg_iwae_standard_error": math.sqrt(variance / count),
            "importance_neg_elbo_nats": -elbo / count,
            "importance_samples": float(self._samples),
            "importance_images": count,
            "effective_samples": effective / count,
        }

    def _bits(self, nats: float) -> dict[str, float]:
        added = self._model.likelihood.added_bits
        return (
            {} if added is None else {"iwae_bits_per_dim": bits_per_dim(nats, self._model.dimensions, added)}
        )


def most_at_once(model: VAE) -> int:
    """The number of images, or sequences, whose draws of a step of the stream are decoded at once."""
    return max(1, VALUES // (draws_of_a_step(model) * math.prod(model.example_shape)))


def draws_of_a_step(model: VAE) -> int:
    """The draws of an image in one step of the stream: DRAWS, and 1 of a sequence, whose noise in time depends on how many are drawn at once."""
    return 1 if isinstance(model, SequenceModel) else DRAWS


def bounds_of(
    model: VAE, seen: Seen, rows: Tensor, *, samples: int, report: Callable[[float], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """L_K of some images of a batch, their ELBO with the same draws, and their effective number of samples, float64 [R] each.

    rows: int64 [R]; samples: K; report: called with the share of the draws that is done.
    """
    x, encoded, slots = seen.x[rows], rows_of(seen.encoded, rows), seen.slots[rows]
    given = seen.model.given_of(rows)
    mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    squares, logs, at_once = total, torch.zeros_like(total), draws_of_a_step(model)
    for start in range(0, samples, at_once):
        stream = noise.Stream(seen.stream.seed, start // at_once, slots)
        inferred = given.infer(encoded, stream, min(at_once, samples - start), False, measured=False)
        weights = model.terms(x, inferred, mask, measured=False).log_weights.double()
        total = torch.logaddexp(total, torch.logsumexp(weights, dim=1))
        squares = torch.logaddexp(squares, torch.logsumexp(2 * weights, dim=1))
        logs = logs + weights.sum(1)
        report(min(start + at_once, samples) / samples)
    return total - math.log(samples), logs / samples, torch.exp(2 * total - squares)
