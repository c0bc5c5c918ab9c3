"""The area under the ROC curve of a score that is to tell odd images from usual ones, with its standard error.

DeLong, DeLong & Clarke-Pearson 1988, by midranks as in Sun & Xu 2014: no pair of images is visited.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Auroc(NamedTuple):
    """P(the score of an odd image > that of a usual one), ties counted by half, and its standard error.

    standard_error: NaN with fewer than two images of a kind.
    """

    auroc: float
    standard_error: float


def auroc(usual: NDArray[np.float64], odd: NDArray[np.float64]) -> Auroc:
    """The area for scores of usual [M] and odd [N] images, of which a larger one means odd. NaN counts as the largest score."""
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([usual, odd])
    ranks = rankdata(np.where(np.isnan(scores), np.inf, scores))  # finite, where a score may be infinite
    is_odd = np.repeat([0, 1], [len(usual), len(odd)])
    usual_ranks, odd_ranks = ranks[: len(usual)], ranks[len(usual) :]
    # For each image: the share of the images of the other kind that it is rightly ordered with.
    of_odd = (odd_ranks - rankdata(odd_ranks)) / len(usual)
    of_usual = 1 - (usual_ranks - rankdata(usual_ranks)) / len(odd)
    variance = math.nan
    if min(len(usual), len(odd)) > 1:
        variance = float(of_odd.var(ddof=1) / len(odd) + of_usual.var(ddof=1) / len(usual))
    return Auroc(float(roc_auc_score(is_odd, ranks)), math.sqrt(variance))
