"""Metrics of reconstructions, and the calibration of p(x|z).

A reconstruction is the decoded mean at the posterior's mean. `METRICS` holds the metrics by name; add another one with

    METRICS["mae"] = Metric("mean absolute error per value", lambda x, means: (x - means).abs().flatten(1).mean(1))

Calibration checks p(x|z) with z drawn from q(z|x): over the values of all images, P(|X - mean| <= |x - mean|) is uniform on
[0, 1] if the decoder's noise is correct. The share of values at which it is below 0.9 is the coverage of the central 90%
intervals (Kuleshov, Fenner & Ermon 2018, section 3.1).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import DataError
from vaescale.evaluation.measures import Seen
from vaescale.likelihoods.base import Likelihood
from vaescale.models.vae import VAE

LEVELS = 100  # number of coverage levels, in equal steps
SHOWN_LEVELS = (50, 90, 99)
LEAST_SSIM_SIZE = 11  # side of SSIM's window in pixels
LEAST_SQUARED_ERROR = 1e-10  # per value, which limits PSNR to 100 dB

PROTOCOL = {
    "interval_coverage": "share of all values within the central interval of p(x|z) of this level in percent, z drawn from q(z|x)",
}


class Metric(NamedTuple):
    """A metric of a reconstruction, whose mean over the images is reported.

    protocol: a phrase that defines it. of: a function from originals and reconstructions, float32 [B, C, H, W] in [0, 1], to
    [B], or to None for images that are too small.
    """

    protocol: str
    of: Callable[[Tensor, Tensor], Tensor | None]
    more_is_better: bool = False


def squared_error(x: Tensor, means: Tensor) -> Tensor:
    """Mean squared error per value, float64 [B]."""
    return (x - means).square().flatten(1).mean(1).double()


def psnr(x: Tensor, means: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100, float64 [B]."""
    return -10 * torch.log10(squared_error(x, means).clamp_min(LEAST_SQUARED_ERROR))


def ssim(x: Tensor, means: Tensor) -> Tensor | None:
    """Structural similarity (Wang et al. 2004), float64 [B]: the mean over the places at which the window is within the image.

    None for images smaller than the window.
    """
    if min(x.shape[2:]) < LEAST_SSIM_SIZE:
        return None
    # torchmetrics imports transformers and matplotlib, where they are installed: two seconds that small images do not need.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, everywhere = structural_similarity_index_measure(
        means, x.float(), data_range=1.0, reduction="none", return_full_image=True
    )
    border = LEAST_SSIM_SIZE // 2  # where the window would see mirrored pixels
    inside = everywhere[..., border : x.shape[2] - border, border : x.shape[3] - border]
    return inside.double().flatten(1).mean(1)


METRICS: dict[str, Metric] = {
    "reconstruction_mse": Metric(
        "squared error per value of the decoded mean at the posterior's mean, clamped to [0, 1]",
        squared_error,
    ),
    "psnr_db": Metric(
        "10 log10(1 / MSE) of each image's reconstruction, at most 100, mean over images",
        psnr,
        more_is_better=True,
    ),
    "ssim": Metric(
        f"of each image's reconstruction, range 1, Gaussian window of {LEAST_SSIM_SIZE} pixels with sigma 1.5, at places where it is "
        "within the image (Wang et al. 2004), mean over images",
        ssim,
        more_is_better=True,
    ),
}


class Reconstruction:
    """The reconstructions of all images, or predicted frames, in float32: the metrics of METRICS, and the calibration of p(x|z).

    A metric is absent for images that are too small for it, coverage for a likelihood without noise around a mean. Raises DataError when no image can be used.
    """

    protocol: dict[str, str]
    """What each metric is, by name; known after `metrics`."""

    coverage: list[float] | None = None
    """The coverage at 1% to 100%; None if p(x|z) has no central intervals. Known after `metrics`."""

    def __init__(self, model: VAE) -> None:
        self._model, self._metrics, self.protocol = model, dict(METRICS), {}
        device = next(model.parameters()).device
        self._sums = _Sums.zeros(len(self._metrics), device)

    def add(self, seen: Seen, report: Callable[[float], None]) -> None:  # noqa: ARG002
        """Add a batch."""
        mask, likelihood, sums = seen.mask, self._model.likelihood, self._sums
        if not mask.any():
            return
        x, params = self._model.images_of(seen.x[mask], seen.params[mask])
        means = likelihood.mean(params).float().clamp(0, 1)
        sums.images.add_(len(x))
        _add_metrics(sums.values, self._metrics, x, means)
        _, params = self._model.images_of(seen.x[mask], seen.drawn.params[mask])
        _add_calibration(sums, likelihood, x, params)

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks."""
        sums = self._sums.over_ranks()
        used = float(sums.images)
        if not used:
            raise comm.known_to_all(
                DataError("no image could be used; `vaescale verify-shards DIR --deep` names the faults")
            )
        means, self.protocol, self.coverage = _result(self._metrics, sums)
        return means


class _Sums(NamedTuple):
    """Sums over images, float64: their number [1]; for each metric the sum of its values and the number of images [M, 2].

    counts: number of values at each level of coverage [LEVELS].
    """

    images: Tensor
    values: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, metrics: int, device: torch.device) -> "_Sums":
        shapes = ((1,), (metrics, 2), (LEVELS,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def over_ranks(self) -> "_Sums":
        """The sums over all ranks, on every rank."""
        total = comm.all_reduce_sum(torch.cat([values.flatten() for values in self]))
        split = torch.split(total, [values.numel() for values in self])
        return _Sums(*(values.view(field.shape) for values, field in zip(split, self, strict=True)))


def _add_metrics(sums: Tensor, metrics: dict[str, Metric], x: Tensor, means: Tensor) -> None:
    for row, metric in zip(sums, metrics.values(), strict=True):
        values = metric.of(x, means)
        if values is not None:
            row.add_(torch.stack([values.double().sum(), row.new_tensor(float(len(values)))]))


def _add_calibration(sums: _Sums, likelihood: Likelihood, x: Tensor, params: Tensor) -> None:
    inside = likelihood.central_mass(x, params)
    if inside is not None:
        level = (inside.flatten() * LEVELS).ceil().clamp(1, LEVELS).long() - 1
        sums.counts.add_(torch.bincount(level, minlength=LEVELS).double())


def _result(
    metrics: dict[str, Metric], sums: _Sums
) -> tuple[dict[str, float], dict[str, str], list[float] | None]:
    """The metrics and their protocol by name, and the coverage."""
    means = {
        name: total / count
        for name, (total, count) in zip(metrics, sums.values.tolist(), strict=True)
        if count
    }
    protocol = {name: metrics[name].protocol for name in means}
    if not sums.counts.any():
        return means, protocol, None
    coverage = (sums.counts.cumsum(0) / sums.counts.sum()).tolist()
    means |= {f"interval_coverage/{level}": coverage[level - 1] for level in SHOWN_LEVELS}
    return means, {**protocol, "interval_coverage": PROTOCOL["interval_coverage"]}, coverage
