"""The area under the ROC curve and its error against every pair of images, and against draws of known distributions."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from vaescale.evaluation.auroc import auroc


def by_pairs(usual: np.ndarray, odd: np.ndarray) -> tuple[float, float]:
    """The area and DeLong's error by all pairs."""
    right = (odd[None] > usual[:, None]) + 0.5 * (odd[None] == usual[:, None])
    of_odd, of_usual = right.mean(0), right.mean(1)
    variance = of_odd.var(ddof=1) / len(odd) + of_usual.var(ddof=1) / len(usual)
    return float(right.mean()), math.sqrt(variance)


@pytest.mark.parametrize("levels", [3, 10_000])
def test_it_agrees_with_all_pairs(levels: int) -> None:
    """With few levels many scores are equal."""
    generator = np.random.default_rng(levels)
    usual = np.floor(levels * generator.random(60))
    odd = np.floor(levels * np.sqrt(generator.random(41)))
    found = auroc(usual, odd)
    assert tuple(found) == pytest.approx(by_pairs(usual, odd), rel=1e-12)
    truth = np.repeat([0, 1], [60, 41])
    assert found.auroc == pytest.approx(roc_auc_score(truth, np.concatenate([usual, odd])), rel=1e-12)


def test_the_error_is_the_spread_over_samples() -> None:
    generator = np.random.default_rng(0)
    found = [auroc(generator.normal(0, 1, 80), generator.normal(1, 1, 120)) for _ in range(100)]
    areas, errors = np.array(found).T
    assert areas.mean() == pytest.approx(
        stats.norm.cdf(1 / math.sqrt(2)), abs=4 * areas.std() / math.sqrt(100)
    )
    assert errors.mean() == pytest.approx(areas.std(ddof=1), rel=0.25)  # 100 samples know it to 7%


def test_infinite_scores_and_nan_are_the_largest() -> None:
    usual = np.array([0.0, 1.0, -np.inf, 2.0])
    assert auroc(usual, np.array([np.inf, np.nan])).auroc == 1
    assert auroc(np.array([np.nan, 0.0]), np.array([np.inf, 0.0])).auroc == 0.5


def test_one_image_of_a_kind_has_no_error() -> None:
    found = auroc(np.array([0.0, 1.0, 2.0]), np.array([1.5]))
    assert found.auroc == pytest.approx(2 / 3)
    assert math.isnan(found.standard_error)
