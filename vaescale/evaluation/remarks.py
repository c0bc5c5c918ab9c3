"""Sentences on the metrics of a run that went wrong: collapsed latents, a bound beyond the uniform one, a sigma far from the errors."""

import math
from collections.abc import Mapping

from vaescale.likelihoods.config import OPTIMAL, GaussianConfig, LikelihoodConfig, LocationScaleConfig

FAR = 1.5  # between sigma and the root mean square error: at least 0.13 nats a value
DIFFERENT = 1.05  # between a running sigma and the root mean square error: 0.002 nats a value


def remarks(metrics: Mapping[str, float], likelihood: LikelihoodConfig) -> list[str]:
    """What is wrong with a model by its metrics, one sentence for each fault; [] where none is seen.

    metrics: those of `likelihood.model_metrics`; names that are absent are not judged.
    """
    found = [_collapse(metrics), _sigma(metrics, likelihood), _bound(metrics, likelihood)]
    return [sentence for sentence in found if sentence]


def _collapse(metrics: Mapping[str, float]) -> str | None:
    if metrics.get("active_units") != 0:
        return None
    return (
        "no latent is active: q(z|x) is the same for all images; take likelihood.sigma=optimal, lower objective.beta or "
        "optimizer.lr, or change the network"
    )


def _sigma(metrics: Mapping[str, float], likelihood: LikelihoodConfig) -> str | None:
    """A sentence if sigma is far from the root mean square error, which is its maximum-likelihood value for a Gaussian."""
    sigma, error = metrics.get("sigma", math.nan), math.sqrt(metrics.get("mse", math.nan))
    ratio = sigma / max(error, 1e-30)
    if not isinstance(likelihood, LocationScaleConfig) or math.isnan(ratio):
        return None
    if 1 / FAR <= ratio <= FAR:
        is_running = isinstance(likelihood, GaussianConfig) and likelihood.sigma in OPTIMAL
        return _running_sigma(sigma, error, likelihood) if is_running else None
    remedy = (
        "the model overfits, or sigma still changes: more images, or more training.steps"
        if likelihood.sigma in OPTIMAL
        else "take likelihood.sigma=optimal, or train longer where sigma is learned"
    )
    return f"sigma ({sigma:.3g}) is far from the root mean square of the errors ({error:.3g}): {remedy}"


def _running_sigma(sigma: float, error: float, likelihood: LocationScaleConfig) -> str | None:
    """A sentence if the running sigma is not that of the held-out errors: it lags behind a falling error, or the model overfits."""
    if 1 / DIFFERENT <= sigma / error <= DIFFERENT:
        return None
    both = f"the running sigma is {sigma:.3g}, and {error:.3g} fits the held-out errors best"
    if sigma > error:
        horizon = likelihood.horizon_steps
        steps = "" if horizon is None else f" of {horizon:g} steps"
        return f"{both}: its average{steps} lags while sigma falls; train longer, or lower likelihood.horizon_steps"
    return f"{both}: the errors of training images are smaller (overfitting)"


def _bound(metrics: Mapping[str, float], likelihood: LikelihoodConfig) -> str | None:
    """A sentence if the bound is worse than that of a uniform distribution over the levels, or over [0, 1] for a density."""
    bits, uniform = metrics.get("bits_per_dim", -math.inf), math.log2(likelihood.levels)
    if bits <= uniform:
        return None
    return (
        f"{bits:.4g} bits per dimension is worse than a uniform distribution, which has {uniform:g}: lower optimizer.lr, set "
        "optimizer.clip_norm, or train longer; a fixed or predicted sigma may be too small or too large"
    )
