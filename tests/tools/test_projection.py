"""The model of a step on many devices, against cases that can be worked out by hand."""

import pytest

from tools.bench.projection import (
    Cluster,
    Compute,
    Exchanges,
    Link,
    all_reduce_seconds,
    least_step,
    step_seconds,
)

INSIDE, BETWEEN = Link(1e-5, 4e11), Link(2e-5, 5e10)
CLUSTER = Cluster(8, INSIDE, BETWEEN)


def test_a_ring_moves_each_byte_twice() -> None:
    """Two nodes of eight: 7/8 of the bytes twice in the node, and the eighth of each device once there and once back."""
    assert all_reduce_seconds(8e8, 8, CLUSTER) == pytest.approx(6e-5 + 2 * 7 / 8 * 8e8 / 4e11)
    both = 6e-5 + 4e-5 + 2 * 7 / 8 * 8e8 / 4e11 + 8e8 / 8 / 5e10
    assert all_reduce_seconds(8e8, 16, CLUSTER) == pytest.approx(both)
    assert all_reduce_seconds(8e8, 1, CLUSTER) == 0


def test_the_backward_pass_hides_all_but_the_last_bucket() -> None:
    cluster = Cluster(1, Link(0, 1e9), Link(0, 1e9))
    compute, buckets = Compute(1.0, 0.6), (10_000_000, 10_000_000)
    assert step_seconds(compute, Exchanges(buckets, 0), 1, cluster) == 1.0
    assert step_seconds(compute, Exchanges(buckets, 0), 2, cluster) == pytest.approx(1.0 + 0.01)
    slow = Cluster(1, Link(0, 1e7), Link(0, 1e7))  # the first bucket begins at 0.3 s, and each takes 1 s
    assert step_seconds(compute, Exchanges(buckets, 0), 2, slow) == pytest.approx(1.0 + 0.3 + 2 - 0.6)
    late = Cluster(1, Link(0.01, 1e12), Link(0.01, 1e12))
    assert step_seconds(compute, Exchanges((), 3), 2, late) == pytest.approx(1.0 + 3 * 2 * 0.01)


def test_the_shortest_step_reaches_the_share() -> None:
    exchanges = Exchanges.of([5, 20_000_000, 3, 10_000_000])
    assert exchanges == Exchanges((80_000_000, 40_000_000), 2)
    least = least_step(exchanges, 64, CLUSTER)
    at = step_seconds(Compute(least, least * 2 / 3), exchanges, 64, CLUSTER)
    assert least / at == pytest.approx(0.95, abs=1e-3)
