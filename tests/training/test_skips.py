"""Skipped images are counted by reason, told once, and too many stop the run."""

import pytest
import torch

from vaescale.data.batch import Batch, Fault
from vaescale.errors import DataError
from vaescale.training.skips import MOST_REPORTED, Skips


def batch(*faults: Fault, images: int = 50) -> Batch:
    ones = torch.ones(images, dtype=torch.bool)
    return Batch(torch.zeros(images, 1, 2, 2), torch.zeros(images), torch.arange(images), ones, (), faults)


def fault(number: int, reason: str = "changed") -> Fault:
    return Fault(number, reason, f"image {number} is broken")


def skips(**changes) -> Skips:
    return Skips(**{"epoch_images": 1000, "most": 0.01, "device": torch.device("cpu"), **changes})


def test_counts_by_reason(capsys) -> None:
    counted = skips()
    steps = [[batch(fault(1), fault(2, "damaged"))], [batch(fault(1)), batch()]]
    assert list(counted.counting(steps)) == steps
    assert counted.metrics() == {"data/skipped/changed": 2.0, "data/skipped/damaged": 1.0}
    assert capsys.readouterr().err.splitlines() == [
        "skipped (changed): image 1 is broken",
        "skipped (damaged): image 2 is broken",
    ]


def test_nothing_skipped_is_no_metric() -> None:
    counted = skips()
    list(counted.counting([[batch()]]))
    assert counted.metrics() == {}


@pytest.mark.parametrize(
    ("count", "most", "stops"), [(10, 0.01, False), (11, 0.01, True), (1, 0.0, True), (0, 0.0, False)]
)
def test_too_many_stop_the_run(count: int, most: float, stops: bool) -> None:
    """A fraction of an epoch of 1,000, as long as less was read."""
    counted = skips(most=most)
    list(counted.counting([[batch(*(fault(n) for n in range(count)))]]))
    if stops:
        with pytest.raises(
            DataError, match=rf"{count} of 50 images could not be used \({count} changed\).*allows"
        ):
            counted.metrics()
    else:
        counted.metrics()


def test_the_bound_grows_with_what_was_read() -> None:
    counted = skips()
    for _ in counted.counting([[batch(fault(1))] for _ in range(100)]):
        pass
    with pytest.raises(DataError, match=r"100 of 5000 images .* allows 50"):
        counted.metrics()


def test_a_flood_is_told_shortly(capsys) -> None:
    counted = skips(most=1.0)
    list(counted.counting([[batch(*(fault(n) for n in range(100)))]]))
    assert len(capsys.readouterr().err.splitlines()) == MOST_REPORTED
