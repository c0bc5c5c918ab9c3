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
    """Accuracies on held-out images of two classifiers that are trained on standardized latents of the training images.

    Beside each accuracy NAME is NAME_balanced, the mean over the classes of the accuracy on a class's images, which does not
    grow with the share of the largest class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, recall_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {
        "linear_probe": LogisticRegression(max_iter=2000),
        f"knn_{NEIGHBOURS}": KNeighborsClassifier(min(NEIGHBOURS, len(train.classes))),
    }
    accuracies, present = {}, np.unique(val.classes)
    for name, classifier in classifiers.items():
        predicted = make_pipeline(StandardScaler(), classifier).fit(*train).predict(val.latents)
        accuracies[name] = float(accuracy_score(val.classes, predicted))
        recall = recall_score(val.classes, predicted, labels=present, average="macro")
        accuracies[f"{name}_balanced"] = float(recall)
    return accuracies


def majority_share(classes: NDArray[np.int64]) -> float:
    """The share of the largest class."""
    return float(np.unique(classes, return_counts=True)[1].max() / len(classes))
