"""Bounds class by class, and what a conditional model says of an image's class by its bounds.

    argmax_y [L(x, y) + log p(y)]        the class of x by the bound L(x, y) <= log p(x|y)
    E log sum_y p(y) w_y <= log p(x)     w_y = p(x, z_y|y) / q(z_y|x, y) with z_y from q(z|x, y): the marginal bound

All y have the same noise, so that differences between classes are not those of draws. The second bound holds for p(x) = sum_y p(y)
p(x|y): it compares with bounds of an unconditional model, which the mean of L(x, y) at the true y does not.

Legend: B images, K classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import DataError, UserError
from vaescale.evaluation.likelihood import bits_per_dim, refuse_without_bound
from vaescale.evaluation.measures import Seen
from vaescale.models.vae import VAE

Z_95 = 1.959964  # of a two-sided interval of 95%
MARGINAL = ("neg_marginal_nats", "neg_marginal_standard_error", "marginal_bits_per_dim")
CLASS_PROTOCOL = {
    "classes": "the one-sample ELBO of `bound`, by the images' classes; standard errors over images",
}
CLASSIFICATION_PROTOCOL = {
    "class_accuracy": "share of the images whose class has the largest one-sample ELBO + log p(y), with equal noise for all classes; p(y): "
    "frequencies of the training images; low and high: Wilson's 95% interval",
    "neg_marginal_nats": "-log sum_y p(y) w_y with one draw of q(z|x, y) for each class: a bound on -log p(x), as an unconditional "
    "model's; the ELBO of a conditional model is given the class",
}


class ByClass:
    """The mean ELBO of the images of each class. Gives no metrics; `table` has them after `metrics` was called.

    names: of the K classes. Raises DataError where no image has a class.
    """

    def __init__(self, model: VAE, *, names: Sequence[str]) -> None:
        self._names = names
        device = next(model.parameters()).device
        # Of the number, -ELBO, its square, log p(x|z) and KL of each class, and of images without one.
        self._sums = torch.zeros(len(names) + 1, 5, dtype=torch.float64, device=device)
        self.table: list[dict[str, float | str]] = []

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Add a batch."""
        terms = seen.model.terms(seen.x, seen.drawn, seen.mask, measured=False)
        kl = terms.kl.double().sum(1)
        log_px = terms.log_px.double()
        nats = kl - log_px
        rows = torch.stack([torch.ones_like(nats), nats, nats.square(), log_px, kl], dim=1)
        labels = seen.batch.labels.to(nats.device)
        last = len(self._sums) - 1
        rows = torch.where(seen.mask[:, None], rows, 0.0)
        self._sums.index_add_(0, torch.where(labels < 0, last, labels), rows)

    def metrics(self) -> dict[str, float]:
        """No metrics; makes the table. All ranks call it."""
        sums = comm.all_reduce_sum(self._sums.flatten()).view(self._sums.shape).tolist()
        if not any(row[0] for row in sums[:-1]):
            raise comm.known_to_all(
                DataError(
                    "no image has a class, which --per-class needs; leave it out, or give images with classes"
                )
            )
        named = zip([*self._names, "none"], sums, strict=True)
        self.table = [_row(name, row) for name, row in named if row[0]]
        return {}


class Classification:
    """The classes of images by the bounds of a conditional model, and the marginal bound.

    Gives class_accuracy, class_accuracy_low and class_accuracy_high, neg_marginal_nats with its standard error over images and its value as
    marginal_bits_per_dim. `confusion`, the number of images by true class and class by the bound, is there after `metrics` was called.
    frequencies: p(y). Raises UserError for a model without bounds, and DataError when no image has a class.
    """

    def __init__(self, model: VAE, *, frequencies: Sequence[float]) -> None:
        refuse_without_bound(model, "leave --per-class out")
        if model.likelihood.reads_x:
            raise UserError(
                "this likelihood fits sigma to each image, which gives no bound of log p(x); leave --per-class out"
            )
        self._model, device = model, next(model.parameters()).device
        self._log_prior = torch.tensor(frequencies, dtype=torch.float64, device=device).log()
        classes = len(frequencies)
        self._confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # of marginal bounds, squares, images
        self.confusion: list[list[int]] = []

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:
        """Add a batch: one pass of the model for each class."""
        bounds, log_weights = bounds_by_class(self._model, seen, len(self._log_prior), report)
        chosen = (bounds + self._log_prior).argmax(1)
        marginal = torch.logsumexp(log_weights + self._log_prior, dim=1)
        ones = torch.ones_like(marginal)
        rows = torch.stack([marginal, marginal.square(), ones], dim=1)
        self._sums += torch.where(seen.mask[:, None], rows, 0.0).sum(0)
        labels = seen.batch.labels.to(chosen.device)
        known = seen.mask & (labels >= 0)
        self._confusion.index_put_((labels[known], chosen[known]), ones[known], accumulate=True)

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        classes = len(self._log_prior)
        total = comm.all_reduce_sum(torch.cat([self._confusion.flatten(), self._sums]))
        confusion, (bound, squares, images) = total[:-3].view(classes, classes), total[-3:].tolist()
        known, right = float(confusion.sum()), float(confusion.diagonal().sum())
        if not known:
            raise comm.known_to_all(DataError("no image has a class, which --per-class needs; leave it out"))
        self.confusion = confusion.long().tolist()
        low, high = wilson(right, known)
        mean, likelihood = bound / images, self._model.likelihood
        metrics = {
            "class_accuracy": right / known,
            "class_accuracy_low": low,
            "class_accuracy_high": high,
            "neg_marginal_nats": -mean,
            "neg_marginal_standard_error": math.sqrt(max(0.0, squares / images - mean**2) / images),
        }
        if likelihood.added_bits is not None:
            bits = bits_per_dim(-mean, likelihood.dimensions, likelihood.added_bits)
            metrics["marginal_bits_per_dim"] = bits
        return metrics


@torch.no_grad()
def bounds_by_class(
    model: VAE, seen: Seen, classes: int, report: Callable[[float], None]
) -> tuple[Tensor, Tensor]:
    """The one-sample ELBO of each image under each class, and the log importance weight of the same draw, float64 [B, K] each."""
    bounds, log_weights = [], []
    for number in range(classes):
        given = model.given(torch.full_like(seen.slots, number))
        drawn = given.infer(given.encode(seen.x), seen.stream, 1, False, measured=False)
        terms = given.terms(seen.x, drawn, seen.mask, measured=False)
        bounds.append(terms.log_px.double() - terms.kl.double().sum(1))
        log_weights.append(terms.log_weights[:, 0].double())
        report((number + 1) / classes)
    return torch.stack(bounds, dim=1), torch.stack(log_weights, dim=1)


def wilson(right: float, number: float) -> tuple[float, float]:
    """The 95% interval of a share. Wilson 1927; Brown, Cai & DasGupta 2001, eq. 4."""
    share, spread = right / number, Z_95**2 / number
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, centre - half), min(1.0, centre + half)


def _row(name: str, sums: Sequence[float]) -> dict[str, float | str]:
    count, nats, squares, log_px, kl = sums
    mean = nats / count
    return {
        "class": name,
        "images": count,
        "neg_elbo_nats": mean,
        "standard_error": math.sqrt(max(0.0, squares / count - mean**2) / count),
        "log_px_nats": log_px / count,
        "kl_nats": kl / count,
    }
