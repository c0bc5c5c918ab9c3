"""The ELBO of a data set and other metrics, with each sample counted once over all ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.config import Window
from vaescale.data.batch import Batch
from vaescale.errors import DataError, UserError
from vaescale.evaluation.measures import Seen
from vaescale.likelihoods.base import Likelihood, LocationScale
from vaescale.models.vae import VAE, Terms

ACTIVE_VARIANCE = 0.01
COLLAPSED_NATS, COLLAPSED_IMAGES = 0.01, 0.99
NO_BOUND = "this objective trains no likelihood of images, so there is no bound on log p(x)"
PER_IMAGE = 4  # number of columns before those of groups and latents


@torch.no_grad()
def evaluate(
    model: VAE, batches: Iterable[Batch], *, seed: int, max_skipped: float = 1.0
) -> dict[str, float]:
    """The metrics of `Bound`, of a model that may be divided over processes: only its forward is called."""
    was_training = model.training
    model.eval()
    device, bound = next(model.parameters()).device, Bound(model, max_skipped=max_skipped)
    for batch in batches:
        images, slots, mask = batch.images.to(device), batch.slots.to(device), batch.mask.to(device)
        with observed(model.likelihood) as sums:
            condition = model.condition_of(batch.labels, batch.vectors)
            terms = model(images, noise.Stream(seed, 0, slots), mask, condition=condition)
            bound.add_terms(terms, mask, len(batch.faults), sums())
    model.train(was_training)
    return bound.metrics()


@contextmanager
def observed(likelihood: Likelihood) -> Iterator[Callable[[], Tensor]]:
    """`SigmaState.observed` of a likelihood with one sigma for all images; of others, a function that returns an empty tensor."""
    if not isinstance(likelihood, LocationScale) or likelihood.state.predicts:
        yield lambda: torch.zeros(0)
        return
    with likelihood.state.observed() as sums:
        yield sums


def sigma_of_images(model: VAE, sums: Tensor) -> dict[str, float]:
    """The metrics data_sigma and sigma_gap_nats (per image, or per sequence) from their (number, sums) of `SigmaState`, over all ranks.

    {} for a likelihood without a sigma for all images. sigma_gap_nats is absent where sigma is fitted to each image.
    """
    likelihood = model.likelihood
    if not isinstance(likelihood, LocationScale) or likelihood.state.predicts or not sums[0]:
        return {}
    metrics = {"data_sigma": float(likelihood.state.fitted(sums))}
    return (
        metrics
        if likelihood.reads_x
        else {**metrics, "sigma_gap_nats": model.predicted_frames * float(likelihood.state.gap_nats(sums))}
    )


class Bound:
    """The one-sample ELBO with the running sigma, in float32.

    Gives the metrics of `model_metrics` and `sigma_of_images`, images (the number evaluated) and skipped (the number of unusable images, absent
    when 0). Raises DataError when more than the fraction `max_skipped` is unusable.
    """

    def __init__(self, model: VAE, *, max_skipped: float = 1.0) -> None:
        self._model, self._max_skipped = model, max_skipped
        self._sums: Tensor | None = None
        self._sigma_sums = torch.zeros(0)
        self._skipped = 0

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Add a batch."""
        self.added(seen)

    def added(self, seen: Seen) -> Terms:
        """Add a batch. Returns its terms."""
        with observed(self._model.likelihood) as sums:
            terms = self._model.terms(seen.x, seen.drawn, seen.mask)
            self.add_terms(terms, seen.mask, seen.skipped, sums())
        return terms

    def add_terms(self, terms: Terms, mask: Tensor, skipped: int, sigma_sums: Tensor) -> None:
        """Add the terms of a batch. skipped: the number of its images that cannot be used; sigma_sums: what `observed` saw of it."""
        sums = column_sums(terms, mask, codes=self._model.num_codes)
        sigma_sums = sigma_sums.to(sums)
        self._sigma_sums = sigma_sums if self._sums is None else self._sigma_sums + sigma_sums
        self._sums = sums if self._sums is None else self._sums + sums
        self._skipped += skipped

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        if self._sums is None:
            raise comm.known_to_all(
                DataError("there are no images to evaluate; give data.val a data set with images")
            )
        parts = (self._sigma_sums, self._sums, self._sums.new_tensor([self._skipped]))
        sigma_sums, total = torch.split(
            comm.all_reduce_sum(torch.cat(parts)), [len(self._sigma_sums), len(self._sums) + 1]
        )
        used, skipped = float(total[-2]), float(total[-1])
        if not used or skipped > self._max_skipped * (used + skipped):
            raise comm.known_to_all(
                DataError(
                    f"{skipped:.0f} of {used + skipped:.0f} images to evaluate cannot be used, data.max_skipped is "
                    f"{self._max_skipped}; `vaescale verify-shards DIR --deep` names them"
                )
            )
        metrics = {**model_metrics(self._model, total[:-2] / used), "images": used}
        if self._model.has_bound:
            metrics |= sigma_of_images(self._model, sigma_sums)
        return metrics | ({"skipped": skipped} if skipped else {})


def column_sums(terms: Terms, mask: Tensor, *, codes: int = 0) -> Tensor:
    """Sums over images for `model_metrics`, and the number of images, float64 [4 + G + 3 L + K + 1]. codes: the model's number K.

    The columns are log_px, kl, squared error, variance; the KL of each group; and for each latent whether its KL is below 0.01
    nats, the posterior's mean, and its square; and the number of places of each code.
    """
    first = torch.stack([terms.log_px, terms.kl.sum(1), terms.squared_error, terms.variance], dim=1)
    parts = [first, terms.kl, terms.latent_kl < COLLAPSED_NATS, terms.unit_mean, terms.unit_square]
    rows = torch.cat([columns.detach().double() for columns in parts], dim=1)
    sums = torch.where(mask[:, None], rows, 0.0).sum(0)
    used = sums.new_zeros(codes)
    if codes:
        used.index_add_(0, terms.codes.flatten(), mask[:, None].expand_as(terms.codes).flatten().double())
    return torch.cat([sums, used, mask.sum().double()[None]])


def model_metrics(model: VAE, means: Tensor) -> dict[str, float]:
    """The metrics of a data set from the means over images of the columns of `column_sums`, float64 [4 + G + 3 L + K].

    neg_elbo_nats, log_px_nats and kl_nats (per image), bits_per_dim, mse (per value, images in [0, 1]), and sigma: the
    likelihood's noise level, or the root of the mean variance of p(x|z) when it depends on z (absent without a noise level).
    A likelihood that fits sigma to each image gives no bound: then the names are neg_profile_elbo_nats and
    profile_log_px_nats, and bits_per_dim is absent, as it is for a model of latents. A density of real numbers has no depth: nats_per_dim
    takes the place of bits_per_dim. A model of codes has no latents: neg_elbo_nats is the length of the codes, bits_per_dim that of one, and
    mse the squared error of one-hot codes. Of sequences the nats are per sequence, neg_elbo_nats_per_frame is of each of the predicted
    frames, and D counts their values. The likelihood's `progress` is added.
    Without a trained p(x|z) (VAE.has_bound) the bound, log_px_nats and bits_per_dim are absent.

    active_units: number of latents whose posterior mean, in units of the prior's standard deviations, has a variance above 0.01
    over the images and the places of a map (Burda, Grosse & Salakhutdinov 2016, section 5.1). collapsed_share: share of the
    latents whose KL is below 0.01 nats for at least 99% of the images (Lucas et al. 2019, definition 1, with
    epsilon = delta = 0.01). group_kl_nats/N: the KL of each group of a ladder. A model with codes has in place of the first two
    code_perplexity, exp of the entropy of the codes over all images and places, at most K, and code_usage, the share of the K codes
    that is used at least once.
    """
    likelihood, dimensions = model.likelihood, model.dimensions
    groups, latents = len(model.group_sizes), model.num_latents
    log_px, kl, squared_error, variance = means[:PER_IMAGE].tolist()
    by_group, below, unit_mean, unit_square, used = torch.split(
        means[PER_IMAGE:], [groups, latents, latents, latents, model.num_codes]
    )
    of = "profile_" if likelihood.reads_x else ""
    metrics = {
        f"neg_{of}elbo_nats": kl - log_px,
        f"{of}log_px_nats": log_px,
        "kl_nats": kl,
        "mse": squared_error / dimensions,
    }
    if model.predicted_frames > 1:
        metrics[f"neg_{of}elbo_nats_per_frame"] = (kl - log_px) / model.predicted_frames
    if not likelihood.reads_x and not (model.of_latents and likelihood.measure == "density"):
        if likelihood.added_bits is None:
            metrics["nats_per_dim"] = (kl - log_px) / dimensions
        else:
            metrics["bits_per_dim"] = bits_per_dim(kl - log_px, dimensions, likelihood.added_bits)
    if not model.has_bound:
        metrics = {name: value for name, value in metrics.items() if name in ("kl_nats", "mse")}
    if likelihood.sigma is not None:
        metrics["sigma"] = float(likelihood.sigma)
    elif math.isfinite(variance):
        metrics["sigma"] = math.sqrt(variance / dimensions)
    if model.num_codes:
        metrics |= _use_of_codes(used)
    elif latents:
        metrics["active_units"] = float((unit_square - unit_mean.square() > ACTIVE_VARIANCE).sum())
        metrics["collapsed_share"] = float((below >= COLLAPSED_IMAGES).double().mean())
    if groups > 1:
        metrics |= {f"group_kl_nats/{number:02d}": nats for number, nats in enumerate(by_group.tolist())}
    return metrics | {name: float(value) for name, value in likelihood.progress.items()}


def _use_of_codes(used: Tensor) -> dict[str, float]:
    """Perplexity and usage from the relative numbers of each code [K]."""
    share = used / used.sum().clamp_min(1e-300)
    entropy = -torch.xlogy(share, share).sum()
    return {"code_perplexity": float(entropy.exp()), "code_usage": float((used > 0).double().mean())}


def metric_names(model: VAE) -> list[str]:
    """The names of the metrics of `model_metrics`, without measuring."""
    columns = PER_IMAGE + len(model.group_sizes) + 3 * model.num_latents + model.num_codes
    return list(model_metrics(model, torch.zeros(columns, dtype=torch.float64)))


def protocol(model: VAE) -> dict[str, str]:
    """The meaning of the metrics of `evaluate` for this model, by name."""
    likelihood, codes = model.likelihood, model.num_codes
    formula, window = "neg_elbo_nats / (D ln 2)", likelihood.window
    depth = f"{window.bits or 0:.6g}"
    images = "8-bit images" if window == Window() else f"{window.levels} levels ({window.text()})"
    if likelihood.measure == "mass":
        bits = f"{formula}: a mass over {likelihood.levels} levels, not comparable with densities or other levels"
    elif getattr(likelihood.config, "dequantize", False):
        bits = f"{formula} + {depth}: a density of dequantized {images} in [0, 1], an upper bound of a code length"
    else:
        bits = f"{formula} + {depth}: a density of {images} in [0, 1], not dequantized: no code length"
    meanings = {
        "bound": "one-sample ELBO per image, float32",
        "log_px_nats": "E log p(x|z) of the same draw: the reconstruction term of the bound, not log p(x)",
        "mse": "squared error per value of the means decoded from that draw",
        "bits_per_dim": bits,
        "sigma": "root of the mean variance of p(x|z); an optimal sigma is the running average from training",
        "active_units": "latents whose posterior mean, in the prior's standard deviations, varies by more than 0.01 (over images; of a map, over places too)",
        "collapsed_share": "of the latents, those with a KL below 0.01 nats for 99% of the images",
    }
    if likelihood.added_bits is None:
        del meanings["bits_per_dim"]
        meanings["nats_per_dim"] = (
            f"neg_elbo_nats / D: a density of real numbers, {window.text()} as 0 to 1; they have no depth, so no bits"
        )
    if isinstance(likelihood, LocationScale) and not likelihood.state.predicts:
        meanings["data_sigma"] = (
            "the sigma that maximizes the likelihood of these images: a check that enters no bound"
        )
        meanings["sigma_gap_nats"] = (
            "how much lower neg_elbo_nats would be with data_sigma in place of sigma, per image: at least 0"
        )
    if likelihood.reads_x:
        for name in ("sigma_gap_nats", "bits_per_dim", "nats_per_dim"):
            meanings.pop(name, None)
        meanings["bound"] = (
            "none: sigma is fitted to each image itself, so the numbers do not apply to unseen images"
        )
    if codes:
        del meanings["active_units"], meanings["collapsed_share"]
        meanings["bound"] = (
            f"-log p(x|z) of the image's codes, plus the length of the codes under a uniform prior over {codes}: nothing is drawn"
        )
        meanings["log_px_nats"] = (
            "log p(x|z) of the image's codes: the reconstruction term of the bound, not log p(x)"
        )
        meanings["kl_nats"] = (
            "places ln(codes): the length of the codes under the uniform prior, the same for every image"
        )
        meanings["code_perplexity"] = "exp of the entropy of the codes over all images and places"
        meanings["code_usage"] = "share of the codes that is used at least once"
    if model.predicted_frames > 1:
        frames = f"frames 2 to {model.predicted_frames + 1} given the first"
        has = (
            "none: sigma is fitted to each frame itself; of"
            if likelihood.reads_x
            else "one-sample ELBO per sequence, float32, of"
        )
        meanings["bound"] = f"{has} {frames}, summed over them; each frame has those before it"
        meanings[f"neg_{'profile_' if likelihood.reads_x else ''}elbo_nats_per_frame"] = (
            f"the same, divided by the {model.predicted_frames} frames"
        )
    if not model.has_bound:
        meanings = {
            name: meaning
            for name, meaning in meanings.items()
            if name not in ("log_px_nats", "bits_per_dim", "nats_per_dim", "data_sigma", "sigma_gap_nats")
        }
        meanings["bound"] = NO_BOUND
        meanings["sigma"] = (
            "root mean square error of reconstructions, running average from training, or the recipe's number"
        )
    return meanings


def refuse_without_bound(model: VAE, remedy: str) -> None:
    """Raise UserError for a model without a trained p(x|z), where something needs bounds on log p(x)."""
    if not model.has_bound:
        raise UserError(f"{NO_BOUND}; {remedy}")


def bits_per_dim(nll_nats: float, dimensions: int, added_bits: float = 8.0) -> float:
    """Bits per dimension: nll / (D ln 2), plus the depth for a density on [0, 1]. added_bits: see `Likelihood.added_bits`."""
    return nll_nats / (dimensions * math.log(2)) + added_bits
