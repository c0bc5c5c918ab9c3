"""The digits are scikit-learn's, each in one split."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vaescale.data.sources import open_source
from vaescale.errors import UserError


def test_every_digit_is_in_exactly_one_split() -> None:
    splits = {split: list(open_source("digits", split)) for split in ("train", "val")}
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 1437, "val": 360}
    keys = [int(sample.key) for samples in splits.values() for sample in samples]
    assert sorted(keys) == list(range(1797))
    bunch = load_digits()
    for sample in splits["train"] + splits["val"]:
        assert np.array_equal(np.rint(sample.image[:, :, 0] * (16 / 255)), bunch.images[int(sample.key)])
        assert sample.label == bunch.target[int(sample.key)]


def test_the_split_is_stratified() -> None:
    labels = [sample.label for sample in open_source("digits", "val")]
    assert min(np.bincount(labels)) >= 34
    assert max(np.bincount(labels)) <= 37


def test_an_unknown_source_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="digits"):
        open_source("celebahq", "train")
