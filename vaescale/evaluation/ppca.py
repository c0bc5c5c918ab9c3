"""Probabilistic PCA, the optimum of a linear VAE with one sigma. Tipping & Bishop 1999; Lucas et al. 2019.

Its log-likelihood of held-out images is exact. The ELBO of a run bounds the same quantity if the run's likelihood is a density
of the same images.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.evaluation.likelihood import bits_per_dim

MOST_DIMENSIONS = 4096  # values of an image: PCA takes the eigenvectors of a D x D matrix
LEAST_EIGENVALUE = 1e-10  # relative to the largest
LEAST_VARIANCE = 1e-20  # of images in [0, 1]: below are rounding errors of their mean
Array = NDArray[np.float64]


class PPCA(NamedTuple):
    """A fit: the number of latents, metrics and reconstructions [N, D] of held-out images, and scores [N, Z] of both sets."""

    latents: int
    metrics: dict[str, float]
    reconstructions: Array
    train_scores: Array
    val_scores: Array


def ppca(train: Array, val: Array, latents: int, *, depth: float | None = 8.0) -> PPCA | None:
    """Fit probabilistic PCA to the training images and measure it on the held-out ones.

    train, val: [N, D] in [0, 1]. latents: number of latents; the fit has fewer if the training images vary in fewer
    directions. depth: bits of the images, None for real numbers, which have no bits per dimension. Returns None if they vary in fewer than two, of which none would be left for sigma.
    """
    from sklearn.decomposition import PCA

    latents = min(latents, _rank(train) - 1)
    if latents < 1:
        return None
    pca = PCA(latents, svd_solver="covariance_eigh").fit(train)
    scores = pca.transform(val)
    reconstructions = pca.inverse_transform(scores).clip(0, 1)
    nats = -float(pca.score(val))
    metrics = {
        "nll_nats": nats,
        "reconstruction_mse": float(np.square(val - reconstructions).mean()),
        "sigma": float(pca.noise_variance_**0.5),
    }
    if depth is not None:
        metrics["bits_per_dim"] = bits_per_dim(nats, train.shape[1], depth)
    return PPCA(latents, metrics, reconstructions, pca.transform(train), scores)


def _rank(images: Array) -> int:
    """The number of directions in which the images vary beyond rounding."""
    values = np.linalg.eigvalsh(np.cov(images.T))
    return int((values > max(LEAST_EIGENVALUE * values[-1], LEAST_VARIANCE)).sum())
