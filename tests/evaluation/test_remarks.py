"""What is said of the metrics of a run that went wrong."""

from typing import Any

import pytest

from vaescale.config import OneOf
from vaescale.evaluation.remarks import remarks
from vaescale.likelihoods.config import LIKELIHOODS

SOUND = {"active_units": 3.0, "bits_per_dim": 7.0, "sigma": 0.1, "mse": 0.01}


@pytest.mark.parametrize(
    ("changes", "likelihood", "words"),
    [
        ({}, {"kind": "gaussian"}, []),
        ({"mse": 0.0095}, {"kind": "gaussian"}, []),
        ({"mse": 0.0075}, {"kind": "gaussian"}, ["0.0866 fits the held-out errors best: its average lags"]),
        ({"mse": 0.0075}, {"kind": "gaussian", "horizon_steps": 40}, ["its average of 40 steps lags"]),
        ({"mse": 0.02}, {"kind": "gaussian"}, ["the errors of training images are smaller (overfitting)"]),
        ({"mse": 0.0075}, {"kind": "gaussian", "sigma": 0.1}, []),
        ({"mse": 0.0075}, {"kind": "laplace"}, []),
        ({"data_sigma": 0.08, "sigma_gap_nats": 3.0}, {"kind": "laplace"}, ["best (3 nats an image between them): its average lags"]),
        ({"active_units": 0.0}, {"kind": "gaussian"}, ["take likelihood.sigma=optimal"]),
        (
            {"active_units": 0.0},
            {"kind": "autoregressive_logistic_mixture"},
            ["set likelihood.relative=false, lower likelihood.radius, lower objective.beta"],
        ),
        (
            {"active_units": 0.0},
            {"kind": "autoregressive_logistic_mixture", "relative": False, "radius": 1},
            ["for latents that say more lower objective.beta"],
        ),
        ({"bits_per_dim": 8.1}, {"kind": "gaussian"}, ["8.1 bits per dimension"]),
        ({"bits_per_dim": 8.1}, {"kind": "categorical"}, ["8.1 bits per dimension"]),
        ({"bits_per_dim": 1.1}, {"kind": "bernoulli"}, ["a uniform distribution, which has 1"]),
        ({"mse": 0.04}, {"kind": "gaussian"}, [r"sigma (0.1) is far from the root mean square of the errors (0.2)"]),
        ({"mse": 0.001}, {"kind": "laplace", "sigma": 0.1}, ["take likelihood.sigma=optimal"]),
        ({"mse": 0.0}, {"kind": "gaussian"}, ["is far from"]),
        ({"mse": 0.04}, {"kind": "student_t"}, []),
    ],
)  # fmt: skip
def test_each_fault_has_a_sentence(
    changes: dict[str, float], likelihood: dict[str, Any], words: list[str]
) -> None:
    said = remarks(SOUND | changes, OneOf(LIKELIHOODS).validate(likelihood))
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


def test_absent_metrics_are_not_judged() -> None:
    assert remarks({}, OneOf(LIKELIHOODS).validate({"kind": "gaussian"})) == []
