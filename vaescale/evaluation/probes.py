"""Probes of latents: accuracy of a linear classifier and of nearest neighbours for the images' classes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 5


class Labelled(NamedTuple):
    """Latents [N, Z] and the classes [N] of their images."""

    latents: NDArray[np.float64]
    classes: NDArray[np.int64]


def probe(train: Labelled, val: Labelled) -> dict[str, float]:
    """Accuracies on held-out images of two classifiers that are trained on standardized latents of the training images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {
        "linear_probe": LogisticRegression(max_iter=2000),
        f"knn_{NEIGHBOURS}": KNeighborsClassifier(min(NEIGHBOURS, len(train.classes))),
    }
    return {
        name: float(make_pipeline(StandardScaler(), classifier).fit(*train).score(*val))
        for name, classifier in classifiers.items()
    }
