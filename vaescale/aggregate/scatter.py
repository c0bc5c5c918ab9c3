"""Posterior means as points in a plane: the two latents, or a t-SNE of more (van der Maaten & Hinton 2008)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.latent_shards import LatentShards
from vaescale.data.lookup import evenly
from vaescale.mixtures.starts import SEEDS

MOST, LEAST_FOR_TSNE = 2000, 100


class Scatter(NamedTuple):
    """Points [N, 2], the classes of their images int64 [N] (-1 without a class), labels of the axes, and a note on the points.

    An axis whose values mean nothing has the label "".
    """

    points: NDArray[np.float64]
    classes: NDArray[np.int64]
    axes: tuple[str, str]
    note: str = ""


def scatter(shards: LatentShards, *, seed: int) -> Scatter:
    """Place the posterior means of at most `MOST` evenly spaced images in the plane."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    means, classes = _means(shards)
    latents = means.shape[1]
    if latents == 1:
        return Scatter(np.column_stack([means[:, 0], np.zeros(len(means))]), classes, ("z", ""))
    if latents == 2:
        return Scatter(means, classes, ("z_1", "z_2"))
    if len(means) < LEAST_FOR_TSNE:
        points = PCA(2).fit_transform(means)
        axes = (f"first principal component of {latents} latents", "second principal component")
        return Scatter(points, classes, axes)
    points = TSNE(2, init="pca", random_state=seed % SEEDS).fit_transform(means).astype(np.float64)
    note = (
        f"t-SNE of {latents} latents: which points are neighbours has a meaning, axes and distances have none"
    )
    return Scatter(points, classes, ("", ""), note)


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
