"""Mixtures by position: exact shares, every sample once a pass, the same batches at every world size."""

from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaescale.data.mixed_plan import Members, MixedPlan, Part
from vaescale.data.order import MOST_LANES
from vaescale.data.plan import rank_slots
from vaescale.data.shares import LARGEST, Shares, whole_weights
from vaescale.errors import DataError

WEIGHTS = st.lists(
    st.one_of(st.floats(0.001, 1000, allow_nan=False), st.integers(1, 10**6).map(float)),
    min_size=1,
    max_size=9,
)
SETS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([0.1, 0.5, 1.0, 3.0, 7.3])
    ),
    min_size=1,
    max_size=4,
)


def mixture(sets: list[tuple[list[int], float]], batch: int = 12, seed: int = 0, **options: int) -> MixedPlan:
    parts = tuple(Part(np.array(shards), weight) for shards, weight in sets)
    return MixedPlan(parts, min(batch, sum(part.size for part in parts)), seed, **options)


def balanced(
    sizes: list[int], weights: list[float] | None = None, batch: int = 8, **options: int
) -> MixedPlan:
    """A plan over one set with classes of these sizes, whose samples are mixed."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    classes = [
        Members(label, (weights or [1.0] * len(sizes))[label], np.flatnonzero(labels == label))
        for label in range(len(sizes))
    ]
    return MixedPlan((Part(np.array([len(labels)]), 1.0, classes),), batch, 0, **options)


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
def test_every_prefix_has_the_exact_shares_to_half_a_sample_a_level(weights: list[float], start: int) -> None:
    shares = Shares([weights])
    whole = [Fraction(one) for one in whole_weights(weights)]
    leaves, turns = shares.at(np.arange(start, start + 300))
    counts = shares.counts(start)
    bound = Fraction(ceil(log2(len(weights))), 2) if len(weights) > 1 else 0
    for position, (leaf, turn) in enumerate(zip(leaves.tolist(), turns.tolist(), strict=True), start=start):
        assert turn == counts[leaf], "a turn counts the earlier positions of its leaf"
        counts[leaf] += 1
        exact = (position + 1) * whole[leaf] / sum(whole)
        assert abs(counts[leaf] - exact) <= bound
    assert counts.tolist() == shares.counts(start + 300).tolist()


@given(weights=WEIGHTS)
def test_weights_become_integers_in_the_same_ratios(weights: list[float]) -> None:
    whole = whole_weights(weights)
    assert sum(whole) <= LARGEST + len(weights)
    for one, number in zip(weights, whole, strict=True):
        assert number / sum(whole) == pytest.approx(one / sum(weights), abs=len(weights) * 2.0**-31)
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]


def test_a_whole_period_has_the_shares_exactly() -> None:
    shares = Shares([[0.5, 0.3, 0.2], [1.0, 1.0]], [3.0, 1.0])
    assert shares.counts(40).tolist() == [15, 9, 6, 5, 5]
    assert shares.counts(40 * 10**6).tolist() == [n * 10**6 for n in (15, 9, 6, 5, 5)]


@settings(deadline=None, max_examples=30)
@given(sets=SETS, block=st.sampled_from([1, 8, 1 << 16]), seed=st.integers(0, 2**63 - 1))
def test_each_set_is_read_to_its_end_before_it_is_read_anew(sets, block: int, seed: int) -> None:
    plan = mixture(sets, seed=seed, block_samples=block)
    drawn = np.concatenate([plan.samples(step) for step in range(40)])
    for first, part in zip(plan.firsts, plan.parts, strict=False):
        of_set = drawn[(drawn >= first) & (drawn < first + part.size)] - first
        whole = len(of_set) // part.size * part.size
        passes = of_set[:whole].reshape(-1, part.size)
        assert (np.sort(passes, axis=1) == np.arange(part.size)).all()
        rest = of_set[whole:]
        assert len(set(rest.tolist())) == len(rest)


@settings(deadline=None, max_examples=60)
@given(
    sets=SETS,
    step=st.integers(0, 10**6),
    world=st.sampled_from([1, 2, 3, 4, 6]),
    parts=st.sampled_from([1, 2]),
)
def test_ranks_share_the_same_batches_at_any_step(sets, step: int, world: int, parts: int) -> None:
    plan = mixture([*sets, ([24], 1.0)], 24)
    micro = [
        [rank_slots(24, rank=rank, world_size=world, accumulation=parts)[number] for rank in range(world)]
        for number in range(parts)
    ]
    slots = np.concatenate([np.concatenate(of_ranks) for of_ranks in micro])
    assert slots.tolist() == list(range(24))
    shared = [plan.samples(step, part) for of_ranks in micro for part in of_ranks]
    assert np.concatenate(shared).tolist() == mixture([*sets, ([24], 1.0)], 24).samples(step).tolist()


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=12), block=st.sampled_from([4, 1 << 16]))
def test_balanced_classes_come_equally_often_and_each_without_repetition(
    sizes: list[int], block: int
) -> None:
    plan = balanced([*sizes, 8], block_samples=block)
    members = [one.numbers for one in plan.parts[0].classes]
    drawn = np.concatenate([plan.samples(step) for step in range(30)])
    for numbers in members:
        of_class = drawn[np.isin(drawn, numbers)]
        assert abs(len(of_class) - len(drawn) / len(members)) <= ceil(log2(len(members))) / 2
        first = of_class[: len(numbers)]
        assert len(set(first.tolist())) == len(first)


def test_classes_are_drawn_by_their_weights() -> None:
    plan = balanced([100, 300], weights=[10.0, 17.3], batch=100)
    drawn = np.concatenate([plan.samples(step) for step in range(100)])
    assert np.isin(drawn, plan.parts[0].classes[0].numbers).sum() == pytest.approx(10_000 * 10 / 27.3, abs=1)


@settings(deadline=None, max_examples=60)
@given(sets=SETS)
def test_an_epoch_for_measurements_has_the_shares_and_each_sample_equally_often(sets) -> None:
    plan = mixture(sets)
    numbers = plan.in_an_epoch(np.arange(plan.num_samples))
    counts = plan.shares.counts(plan.num_samples)
    for first, part, count, passes in zip(plan.firsts, plan.parts, counts, plan.passes(), strict=False):
        times = np.bincount(
            numbers[(numbers >= first) & (numbers < first + part.size)] - first, minlength=part.size
        )
        assert times.sum() == count == pytest.approx(passes * part.size)
        assert times.max() - times.min() <= 1
    few = np.arange(plan.num_samples)[::3]
    assert plan.in_an_epoch(few).tolist() == numbers[few].tolist()


def test_an_epoch_of_balanced_classes_reads_each_class_as_often() -> None:
    plan = balanced([5, 15, 40], batch=6)
    numbers = plan.in_an_epoch(np.arange(60))
    assert [np.isin(numbers, one.numbers).sum() for one in plan.parts[0].classes] == [20, 20, 20]
    assert plan.passes() == [1.0]


def test_an_epoch_is_as_long_as_all_sets_together() -> None:
    plan = mixture([([50, 50], 3.0), ([20], 1.0)], batch=16)
    assert (plan.num_samples, plan.steps_per_epoch, plan.epoch(15)) == (120, 7, 2)
    assert plan.passes() == [0.9, 1.5]
    with pytest.raises(DataError, match=r"global_batch \(=200\) exceeds the 120 training samples"):
        MixedPlan(plan.parts, 200, 0)


def test_passes_and_sets_have_orders_of_their_own() -> None:
    plan = mixture([([64], 1.0), ([64], 1.0)], batch=128)
    (a, b), (c, _) = (
        [plan.samples(step)[plan.samples(step) // 64 == which] % 64 for which in (0, 1)] for step in (0, 1)
    )
    assert sorted(a) == sorted(b) == sorted(c) == list(range(64))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_the_hash_names_weights_sets_and_classes() -> None:
    plans = [
        mixture([([60], 1.0), ([60], 1.0)]),
        mixture([([60], 2.0), ([60], 1.0)]),
        mixture([([60], 1.0), ([30, 30], 1.0)]),
        mixture([([60], 1.0), ([60], 1.0)], seed=1),
        balanced([60, 60], batch=12),
        balanced([60, 60], weights=[2.0, 1.0], batch=12),
    ]
    assert len({plan.hash for plan in plans}) == 6
    assert mixture([([60], 3.0), ([60], 3.0)]).hash == plans[0].hash, "only ratios count"
    assert plans[0].shares_hash == plans[3].shares_hash, "how often a sample is drawn depends on no seed"


def test_memory_and_work_do_not_grow_with_the_steps() -> None:
    plan = mixture([([1000] * 40, 1.0), ([5], 1.0)], batch=64, block_samples=1000)
    for step in range(0, 3000, 29):
        plan.samples(step)
    kept = [strand.order.kept for strand in plan._strands]
    assert all(len(orders) <= 4 * MOST_LANES for orders in kept)
    assert max(turn for turn, _ in kept[1]) - min(turn for turn, _ in kept[1]) <= 2, (
        "old passes are forgotten"
    )
