"""The relation of a predicted sigma(z) to the density of z: mean log sigma(z) against the log density of z."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.densities import aggregate_log_density
from vaescale.aggregate.refinement import mean_log_sigma
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture, log_density
from vaescale.mixtures.points import Moments
from vaescale.models.vae import VAE

BATCH = 250
SHOWN = 300  # points of each source in the figure
Array = NDArray[np.float64]


@torch.no_grad()
def sigma_and_density(
    model: VAE, moments: Moments, mixture: Mixture | None, draws: Mapping[str, Tensor], *, seed: int
) -> dict[str, Any] | None:
    """Correlate mean log sigma(z) with the log density of z, for latents [B, Z] from several sources.

    Densities: q(z), the sum over the narrow q(z|x) of all training images, and the smoother density of the mixture, if given.
    Returns the correlations over all sources, and for each source its means, correlations and points to draw; None if sigma
    does not depend on z. moments: the moments of q(z|x) of the training images. All ranks call it.
    """
    try:
        log_sigmas = [_log_sigmas(model, z, seed) for z in draws.values()]
    except UserError:
        return None
    z = torch.cat([*draws.values()]).double().cpu()
    densities = {"log q(z)": aggregate_log_density(moments, z).numpy()}
    if mixture is not None:
        densities["log mixture"] = log_density(mixture, z).numpy()
    ends = np.cumsum([len(values) for values in log_sigmas])[:-1]
    by_source = {
        name: dict(zip(draws, np.split(values, ends), strict=True)) for name, values in densities.items()
    }
    shown, pooled = list(densities)[-1], np.concatenate(log_sigmas)
    return {
        "pearson": {name: float(pearsonr(values, pooled).statistic) for name, values in densities.items()},
        "spearman": {name: _spearman(values, pooled) for name, values in densities.items()},
        "drawn": shown,
        "kinds": {
            source: _of_source({name: values[source] for name, values in by_source.items()}, shown, log_sigma)
            for source, log_sigma in zip(draws, log_sigmas, strict=True)
        },
    }


def _of_source(densities: Mapping[str, Array], shown: str, log_sigma: Array) -> dict[str, Any]:
    return {
        "mean_log_sigma": float(log_sigma.mean()),
        "mean_density_nats": {name: float(values.mean()) for name, values in densities.items()},
        "spearman": {name: _spearman(values, log_sigma) for name, values in densities.items()},
        "points": [densities[shown][:SHOWN].tolist(), log_sigma[:SHOWN].tolist()],
    }


def _log_sigmas(model: VAE, z: Tensor, seed: int) -> Array:
    """Mean log sigma(z) of each z, [B]. Raises UserError when sigma does not depend on z."""
    slots = torch.arange(len(z), device=z.device)
    batches = zip(torch.split(z, BATCH), torch.split(slots, BATCH), strict=True)
    values = [mean_log_sigma(model, batch, noise.Stream(seed, 3, own_slots)) for batch, own_slots in batches]
    log_sigmas: Array = torch.cat(values).double().cpu().numpy()
    return log_sigmas


def _spearman(x: Array, y: Array) -> float:
    return float(spearmanr(x, y).statistic)
