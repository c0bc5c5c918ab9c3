"""Sentences on the metrics of a run that went wrong: collapsed latents, a bound beyond the uniform one, a sigma far from the errors."""

import math
from collections.abc import Mapping

from vaescale.likelihoods.config import (
    OPTIMAL,
    AutoregressiveLogisticMixtureConfig,
    GaussianConfig,
    LikelihoodConfig,
    LocationScaleConfig,
)

FAR = 1.5  # between sigma and the root mean square error: at least 0.13 nats a value
DIFFERENT = 1.05  # between a running sigma and the root mean square error: 0.002 nats a value


def remarks(
    metrics: Mapping[str, float], likelihood: LikelihoodConfig, *, of: str = "the held-out"
) -> list[str]:
    """What is wrong with a model by its metrics, one sentence for each fault; [] where none is seen.

    metrics: those of `likelihood.model_metrics`, data_sigma and sigma_gap_nats; names that are absent are not judged. of: what kind of
    images were measured, as an article.
    """
    found = [_collapse(metrics, likelihood), _sigma(metrics, likelihood, of), _bound(metrics, likelihood)]
    return [sentence for sentence in found if sentence]


def arrived_sigma(
    metrics: Mapping[str, float], likelihood: LikelihoodConfig, *, of: str = "the held-out"
) -> str | None:
    """A sentence on the running sigma, that of the measured images, and the nats between them; None without a running sigma."""
    is_running = isinstance(likelihood, LocationScaleConfig) and likelihood.sigma in OPTIMAL
    if not is_running or "sigma_gap_nats" not in metrics:
        return None
    return _both(metrics, metrics["sigma"], metrics["data_sigma"], of)


def _both(metrics: Mapping[str, float], sigma: float, fitted: float, of: str) -> str:
    gap_nats = metrics.get("sigma_gap_nats", math.nan)
    each = "a sequence" if "neg_elbo_nats_per_frame" in metrics else "an image"
    nats = "" if math.isnan(gap_nats) else f" ({gap_nats:.3g} nats {each} between them)"
    return f"the running sigma is {sigma:.3g}, and {fitted:.3g} fits {of} errors best{nats}"


def _collapse(metrics: Mapping[str, float], likelihood: LikelihoodConfig) -> str | None:
    if metrics.get("active_units") != 0:
        return None
    if isinstance(likelihood, AutoregressiveLogisticMixtureConfig):
        remedies = ["set likelihood.relative=false"] if likelihood.relative else []
        remedies += ["lower likelihood.radius"] if likelihood.radius > 1 else []
        remedies += ["lower objective.beta", "train longer, or take another likelihood.kind"]
        return (
            "no latent is active: the pixels before a pixel say what z could; for latents that say more "
            + ", ".join(remedies)
        )
    return (
        "no latent is active: q(z|x) is the same for all images; take likelihood.sigma=optimal, lower objective.beta or "
        "optimizer.lr, or change the network"
    )


def _sigma(metrics: Mapping[str, float], likelihood: LikelihoodConfig, of: str) -> str | None:
    """A sentence if sigma is far from the root mean square error, which is its maximum-likelihood value for a Gaussian."""
    sigma, error = metrics.get("sigma", math.nan), math.sqrt(metrics.get("mse", math.nan))
    ratio = sigma / max(error, 1e-30)
    if not isinstance(likelihood, LocationScaleConfig) or math.isnan(ratio):
        return None
    if 1 / FAR <= ratio <= FAR:
        known = "data_sigma" in metrics or isinstance(likelihood, GaussianConfig)
        is_running = known and likelihood.sigma in OPTIMAL
        return _running_sigma(metrics, likelihood, of) if is_running else None
    remedy = (
        "the model overfits, or sigma still changes: more images, or more training.steps"
        if likelihood.sigma in OPTIMAL
        else "take likelihood.sigma=optimal, or train longer where sigma is learned"
    )
    return f"sigma ({sigma:.3g}) is far from the root mean square of the errors ({error:.3g}): {remedy}"


def _running_sigma(metrics: Mapping[str, float], likelihood: LocationScaleConfig, of: str) -> str | None:
    """A sentence if the running sigma is not that of the measured errors: it lags behind a falling error, or the model overfits."""
    sigma, error = metrics["sigma"], metrics.get("data_sigma", math.sqrt(metrics["mse"]))
    if 1 / DIFFERENT <= sigma / error <= DIFFERENT:
        return None
    both = _both(metrics, sigma, error, of)
    if sigma > error:
        horizon = likelihood.horizon_steps
        steps = "" if horizon is None else f" of {horizon:g} steps"
        return f"{both}: its average{steps} lags while sigma falls; train longer, lower likelihood.horizon_steps, or evaluate with --refit-sigma"
    return f"{both}: the errors of training images are smaller (overfitting)"


def _bound(metrics: Mapping[str, float], likelihood: LikelihoodConfig) -> str | None:
    """A sentence if the bound is worse than that of a uniform distribution over the levels, or over [0, 1] for a density."""
    bits, uniform = metrics.get("bits_per_dim", -math.inf), math.log2(likelihood.levels or 1)
    if bits <= uniform:
        return None
    has_sigma = isinstance(likelihood, LocationScaleConfig)
    of_sigma = "; a fixed or predicted sigma may be too small or too large" if has_sigma else ""
    return (
        f"{bits:.4g} bits per dimension is worse than a uniform distribution, which has {uniform:g}: lower optimizer.lr, set "
        f"optimizer.clip_norm, or train longer{of_sigma}"
    )
