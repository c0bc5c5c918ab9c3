"""Modes that samples have: of Stacked MNIST, the combination of its channels' classes by a classifier.

A mode is found if a sample has it. The samples' distribution over modes is compared with the uniform one by KL(samples || uniform), in nats:
Srivastava et al. 2017, section 4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale.perceptual.classifier import Classifier

BATCH = 250


class Modes(NamedTuple):
    """found: modes that a sample has, of `possible`. kl_nats: from the samples' distribution over modes to the uniform one."""

    found: int
    possible: int
    samples: int
    kl_nats: float


def of_labels(labels: Tensor, possible: int) -> Modes:
    """The modes of samples with these labels int64 [N]."""
    counts = torch.bincount(labels, minlength=possible).double()
    shares = counts[counts > 0] / len(labels)
    kl = float((shares * shares.log()).sum()) + math.log(possible)
    return Modes(int((counts > 0).sum()), possible, len(labels), kl)


@torch.no_grad()
def stacked(images: Tensor, classifier: Classifier) -> Tensor:
    """The modes int64 [N] of images [N, C, S, S]: the classes of their channels, which a classifier of one channel finds, as digits of a
    number, the first channel's first.
    """
    count, channels, side, _ = images.shape
    classes = classifier(images.reshape(count * channels, 1, side, side))
    weights = classes.shape[1] ** torch.arange(channels - 1, -1, -1)
    combined: Tensor = (classes.argmax(1).view(count, channels) * weights).sum(1)
    return combined
