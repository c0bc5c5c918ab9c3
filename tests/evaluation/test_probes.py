"""Accuracies of probes where one class has most of the images, and PCA of images that do not vary."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vaescale.data.batch import Batch
from vaescale.evaluation.ppca import ppca
from vaescale.evaluation.probes import Labelled, majority_share, probe
from vaescale.perceptual.classifier import Classifier, Shape, accuracy


def labelled(seed: int, *, separation: float) -> Labelled:
    """200 latents, of which 5% are of class 1, moved by `separation`."""
    classes = (np.arange(200) % 20 == 0).astype(np.int64)
    latents = np.random.default_rng(seed).normal(size=(200, 3)) + separation * classes[:, None]
    return Labelled(latents, classes)


@pytest.mark.parametrize(("separation", "balanced"), [(0.0, 0.5), (20.0, 1.0)])
def test_balanced_accuracy_tells_latents_from_the_largest_class(separation: float, balanced: float) -> None:
    train, val = (labelled(seed, separation=separation) for seed in (0, 1))
    accuracies = probe(train, val)
    for name in ("linear_probe", "knn_5"):
        assert accuracies[name] >= 0.94
        assert accuracies[f"{name}_balanced"] == pytest.approx(balanced, abs=0.02)
    assert majority_share(val.classes) == 0.95


def test_a_classifier_s_accuracy_has_its_balanced_one_beside() -> None:
    """A classifier of three classes that always names class 0; class 2 has no image."""
    model = Classifier(Shape(1, 8, 3, 4)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def batches() -> Iterator[Batch]:
        for labels, used in (([0, 0, 0, 1], 4), ([0, 1, 1, 1], 2)):
            count = len(labels)
            yield Batch(
                images=torch.zeros(count, 1, 8, 8, dtype=torch.uint8),
                labels=torch.tensor(labels),
                slots=torch.arange(count),
                mask=torch.arange(count) < used,
                faults=(),
            )

    assert accuracy(model, 3, batches()) == (4 / 6, 0.5, 4 / 6, 6)


@pytest.mark.parametrize("directions", [0, 1])
def test_images_that_hardly_vary_have_no_pca(directions: int) -> None:
    images = np.full((30, 9), 128 / 255)
    images[:10, 0] += 0.1 * directions
    assert ppca(images, images, 4) is None
    images[5:15, 1] += 0.1
    assert (ppca(images, images, 4) is None) == (directions == 0)
