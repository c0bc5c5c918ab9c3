"""What is said of a training that ended and yet failed."""

import pytest

from vaescale.likelihoods.config import GaussianConfig
from vaescale.training.summary import went_wrong


def row(step: int, bound: float, *, active: float = 3) -> dict[str, float]:
    return {"step": step, "val/mse": 0.1, "val/neg_elbo_nats": bound, "val/active_units": active}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], []),
        ([{"step": 1, "train/mse": 0.1}], []),
        ([row(5, 7.0)], []),
        ([row(5, 7.0), row(10, 3.0), row(15, 4.0)], []),
        ([row(5, 7.0, active=0), row(10, 3.0)], []),
        ([row(5, 7.0), row(10, 3.0, active=0)], ["no latent is active"]),
        (
            [row(5, 7.0), row(10, 3.0, active=0), {"step": 13, "train/mse": 0.1}],
            ["at step 10: no latent is active"],
        ),
        ([row(5, 7.0), row(10, 1.2e7)], ["neg_elbo_nats rose from 7 at step 5 to 1.2e+07 at step 10"]),
        ([row(5, 7.0), row(10, 8.0, active=0)], ["no latent is active", "neg_elbo_nats rose"]),
        ([row(5, 9.0), {**row(10, 7.0), "val/bits_per_dim": 3e5}], ["worse than a uniform distribution"]),
    ],
)
def test_it_is_said_when_a_run_learned_nothing(rows: list[dict[str, float]], words: list[str]) -> None:
    said = went_wrong(rows, GaussianConfig())
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))
