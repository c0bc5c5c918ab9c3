"""Posterior means as points in a plane: the two latents, or a t-SNE of more (van der Maaten & Hinton 2008)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.latent_shards import LatentShards
from vaescale.data.lookup import evenly
from vaescale.mixtures.starts import SEEDS

MOST, LEAST_FOR_TSNE = 2000, 100


class Scatter(NamedTuple):
    """Points [N, 2], the classes of their images int64 [N] (-1 without a class), and a label for the axes."""

    points: NDArray[np.float64]
    classes: NDArray[np.int64]
    axes: str


def scatter(shards: LatentShards, *, seed: int) -> Scatter:
    """Place the posterior means of at most `MOST` evenly spaced images in the plane."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    means, classes = _means(shards)
    latents = means.shape[1]
    if latents == 1:
        return Scatter(np.column_stack([means[:, 0], np.zeros(len(means))]), classes, "z")
    if latents == 2:
        return Scatter(means, classes, "z_1 and z_2")
    if len(means) < LEAST_FOR_TSNE:
        points = PCA(2).fit_transform(means)
        return Scatter(points, classes, f"two principal components of {latents} latents")
    points = TSNE(2, init="pca", random_state=seed % SEEDS).fit_transform(means).astype(np.float64)
    return Scatter(points, classes, f"t-SNE of {latents} latents")


def _means(shards: LatentShards) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    samples = shards.index.shards.samples
    wanted, starts = evenly(int(samples.sum()), MOST).numpy(), np.cumsum(samples) - samples
    means, classes = [], []
    for number, start in enumerate(starts.tolist()):
        rows = wanted[(wanted >= start) & (wanted < start + samples[number])] - start
        if len(rows):
            block = shards.read(number)
            means.append(block.moments[rows, 0].astype(np.float64))
            classes.append(block.labels[rows])
    return np.concatenate(means), np.concatenate(classes)
